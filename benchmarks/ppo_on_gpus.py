"""What does a step of PPO take on GPUs: seconds by phase, tokens a second, peak memory? Models of Qwen3's shapes with
random weights, full fine-tuning and LoRA, ZeRO-2 and 3, on as many GPUs as there are.

    python benchmarks/ppo_on_gpus.py [--shapes 0.6b,1.7b] [--gpus 1] [--zero 2,3] [--tuners full,lora] [--steps 3]
    python benchmarks/ppo_on_gpus.py --shapes tiny --gpus 0     # on two processes of the CPU, to try it

64 prompts of 256 tokens, answers of 324 that may not end earlier (random weights would end at random), 4 epochs of 2
minibatches. Each arm is a training as a Ray Train worker runs it, in processes of its own; the first step is left out.
Prints a line an arm as it ends, so that an arm that fails or is cut off takes no other with it.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "num_attention_heads": 4},
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144, "num_attention_heads": 16},
}
"""Qwen3-0.6B and Qwen3-1.7B as their config.json has them: 8 key-value heads of 128, 151,936 tokens, tied."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.6b,1.7b")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--zero", default="2,3")
    parser.add_argument("--tuners", default="full,lora")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--answers", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--new", type=int, default=324)
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--limit", type=int, default=400, help="seconds for an arm")
    options = parser.parse_args()
    print("shape  tuner  ZeRO  workers   step s   rollout    score   update   rollout tok/s   peak GiB   weights GiB")
    with tempfile.TemporaryDirectory() as scratch:
        for shape in options.shapes.split(","):
            folder = Path(scratch) / shape
            subprocess.run([sys.executable, __file__, "make", shape, str(folder), str(options.gpus)], check=True)
            for tuner in options.tuners.split(","):
                for zero in options.zero.split(","):
                    _arm(shape, folder, tuner, int(zero), options)


def _arm(shape: str, folder: Path, tuner: str, zero: int, options: argparse.Namespace) -> None:
    workers = options.gpus or 2
    out = folder / f"{tuner}-{zero}"
    told = {
        "folder": str(folder),
        "out": str(out),
        "tuner": tuner,
        "zero": zero,
        "workers": workers,
        "gpu": bool(options.gpus),
        **{key: getattr(options, key) for key in ("steps", "answers", "prompt", "new", "micro", "limit")},
    }
    port = 20000 + os.getpid() % 10000 + zero * 7 + (tuner == "lora")
    processes = []
    for rank in range(workers):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers}
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, __file__, "worker", json.dumps(told)]
        processes.append(
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        )
    end = time.time() + options.limit
    texts = []
    for process in processes:
        try:
            texts.append(process.communicate(timeout=max(1, end - time.time()))[0])
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that holds its output open
            texts.append(process.communicate()[0])
    name = f"{shape:6} {tuner:6} {zero:4} {workers:8}"
    if not (out / "runtime_stats.json").is_file():
        print(f"{name}   no result: {' | '.join(texts[0].strip().splitlines()[-40:])[-3000:]}", flush=True)
        return
    measured: dict[str, Any] = json.loads((out / "runtime_stats.json").read_text())
    steps = measured["steps"][1:]
    seconds = {phase: statistics.median(step[phase] for step in steps) for phase in ("rollout", "score", "update")}
    print(
        f"{name} {sum(seconds.values()):8.2f} {seconds['rollout']:9.2f} {seconds['score']:8.2f} "
        f"{seconds['update']:8.2f} {options.answers * options.new / seconds['rollout']:15,.0f} "
        f"{measured['peak'] / 2**30:10.1f} {measured['weights'] / 2**30:7.2f} of {measured['separate'] / 2**30:.2f}",
        flush=True,
    )


def make(shape: str, folder: Path, gpus: int) -> None:
    """`policy`, `reward` (another model of one output) and `store/reward-0` (an adapter on the policy, as a `reward`
    stage leaves it), and the prompts."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

    from tunery.models.load import write_base
    from tunery.models.scratch import train_tokenizer
    from tunery.store.rows import write_rows

    tokenizer = train_tokenizer([Path(__file__).read_text()], 400)
    config = Qwen3Config(
        **SHAPES[shape],
        num_key_value_heads=SHAPES[shape]["num_attention_heads"] // 2 if shape != "tiny" else 2,
        head_dim=128 if shape != "tiny" else 16,
        vocab_size=151_936 if shape != "tiny" else 400,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if gpus else "cpu"):
        for kind, name in ((Qwen3ForCausalLM, "policy"), (Qwen3ForSequenceClassification, "reward")):
            torch.manual_seed(len(name))
            model = kind(config)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
        lora = LoraConfig(r=16, target_modules="all-linear", exclude_modules=["score"], modules_to_save=["score"])
        lora.task_type = "SEQ_CLS"
        artifact = folder / "store" / "reward-0"
        get_peft_model(model, lora).save_pretrained(artifact / "adapter")
    tokenizer.save_pretrained(artifact / "adapter")
    write_base(artifact, {"pretrained": str(folder / "policy"), "revision": None})
    (artifact / "head.json").write_text(json.dumps({"labels": ["reward"]}))
    facts = {"reward_mean": 0.0, "reward_std": 1.0}
    (artifact / "manifest.json").write_text(json.dumps({"kind": "reward", "facts": facts}))
    rows = [{"id": f"{n:016x}", "messages": [{"role": "user", "content": f"row {n}"}]} for n in range(256)]
    write_rows(rows, folder / "prompts")


def work(told: dict[str, Any]) -> None:
    import faulthandler

    import torch

    from tunery.spec import Compute, Ppo
    from tunery.training.job import Job, RowSource
    from tunery.training.ppo import ppo_worker
    from tunery.workers.process_state import prepare_process

    faulthandler.dump_traceback_later(told["limit"] - 10)  # says where an arm stood that is cut off
    if told["gpu"]:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if told["gpu"] else "gloo")
    prepare_process("gpu" if told["gpu"] else "cpu", 1 if not told["gpu"] else 8)
    from tunery.training.ppo.trainer import PpoTrainer
    from tunery.training.sequences import PromptSet

    folder, out, steps = Path(told["folder"]), Path(told["out"]), []
    plain, read = PpoTrainer.step, PromptSet.ids

    def step(self: PpoTrainer, rows: Any) -> dict[str, float]:
        found = plain(self, rows)
        steps.append(dict(self.phase_stats.seconds))
        return found

    def of_one_length(self: PromptSet, index: int) -> list[int]:
        return (read(self, index) * told["prompt"])[: told["prompt"]]

    PpoTrainer.step, PromptSet.ids = step, of_one_length  # type: ignore[method-assign]
    lora = told["tuner"] == "lora"
    spec = Ppo.model_validate(
        {
            "kind": "ppo",
            "data": "prompts",
            "model": "policy",
            "reward": "rm",
            "tuner": {"lora": {"rank": 16}} if lora else "full",
            "epochs": told["steps"] * told["answers"] / 256,
            "learning_rate": 1e-6,
            "global_batch_size": told["answers"],
            "minibatches": 2,
            "max_length": 2048,
            "sampling": {"max_new_tokens": told["new"], "min_new_tokens": told["new"]},
        }
    )
    out.mkdir(parents=True, exist_ok=True)
    reward = {"artifact": str(folder / "store" / "reward-0")}
    job = Job(
        stage="ppo",
        trial="",
        spec=spec,
        seed=17,
        model={"pretrained": str(folder / "policy"), "revision": None},
        data=(RowSource(folder / "prompts"),),
        eval_data=(),
        reward=reward if lora else {"pretrained": str(folder / "reward"), "revision": None},
        out=out,
        staging_dir=out,
        store=out,
        events=out / "events",
        compute=Compute(
            workers=told["workers"],
            device="gpu" if told["gpu"] else "cpu",
            zero_stage=told["zero"],
            micro_batch_size=told["micro"],
            save_steps=1000,
            gradient_checkpointing=True,
        ),
        started_at=time.time(),
    )
    run = ppo_worker.PpoRun(job, lambda metrics: None)
    for _ in range(told["steps"]):
        run.step()
    if run.rank == 0:
        peak = torch.cuda.max_memory_allocated() if told["gpu"] else 0
        weights = {"weights": run.weight_bytes, "separate": run.unshared_weight_bytes}
        (out / "runtime_stats.json").write_text(json.dumps({"steps": steps, "peak": peak, **weights}))
    torch.distributed.barrier()


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"]:
        make(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    elif sys.argv[1:2] == ["worker"]:
        work(json.loads(sys.argv[2]))
    else:
        main()
