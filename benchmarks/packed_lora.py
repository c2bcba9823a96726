"""What do LoRA trainings take in a pack, beside each for itself? Seconds of a step, and memory.

    python benchmarks/packed_lora.py                                        # a model of 1 M parameters, on a core
    python benchmarks/packed_lora.py --device gpu --shape 0.6b --batch 4 --members 1,2,4,8 --precision bf16

Alone is what an `sft` stage of one worker does: TRL's SFTTrainer on DeepSpeed ZeRO-2, one training after another. Both
learn the same rows in the same order (tests/integration/test_packed.py compares their curves). Rows are log-normal in
length, mean 256 tokens on a GPU and 64 on a CPU. Each arm is a process of its own; the first steps are left out.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 128, "num_hidden_layers": 4, "intermediate_size": 352, "num_attention_heads": 4},
    "0.6b": {"hidden_size": 1024, "num_hidden_layers": 28, "intermediate_size": 3072, "num_attention_heads": 16},
    "1.7b": {"hidden_size": 2048, "num_hidden_layers": 28, "intermediate_size": 6144, "num_attention_heads": 16},
}
"""The larger ones are Qwen3-0.6B's and Qwen3-1.7B's: 8 key-value heads of 128, 151,936 tokens, tied."""
WARM = 3
"""Steps that are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "gpu"])
    parser.add_argument("--shape", default="tiny", choices=SHAPES)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--batch", type=int, default=4, help="rows of a step of each training")
    parser.add_argument("--members", default="1,2,4,8")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--budget", type=int, default=0, help="padded tokens of a block; 0: as the pack has it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        request = {**vars(options), "folder": scratch}
        _process("make", request)
        members = [int(number) for number in options.members.split(",")]
        seconds: dict[int, list[float]] = {number: [] for number in (0, *members)}
        peaks: dict[int, float] = {}
        for _ in range(options.rounds):
            for number in seconds:
                measured = _process("alone" if number == 0 else "packed", {**request, "count": number})
                seconds[number].append(measured["seconds"])
                peaks[number] = measured["peak"] / 2**30
        alone = statistics.median(seconds[0])
        print(f"{options.shape}, batch {options.batch}, {measured['device']}; medians of {options.rounds}")
        print("trainings      seconds a step   of one training   times alone   peak GiB")
        print(f"alone          {alone:14.4f} {alone:17.4f} {1.0:13.2f} {peaks[0]:10.2f}")
        for number in members:
            step = statistics.median(seconds[number])
            print(
                f"{number:2} in a pack   {step:14.4f} {step / number:17.4f} {alone * number / step:13.2f} "
                f"{peaks[number]:10.2f}"
            )
        assert folder.is_dir()


def _process(arm: str, request: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, arm, json.dumps(request)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{arm}: {done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def make(request: dict[str, Any]) -> dict[str, Any]:
    """A model with random weights, and rows."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from tunery.models.scratch import train_tokenizer
    from tunery.store.rows import write_rows

    folder, small = Path(request["folder"]), request["shape"] == "tiny"
    tokenizer = train_tokenizer([Path(__file__).read_text()], 400)
    shape = SHAPES[request["shape"]]
    config = Qwen3Config(
        **shape,
        num_key_value_heads=shape["num_attention_heads"] if small else 8,
        head_dim=32 if small else 128,
        vocab_size=2048 if small else 151_936,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    with torch.device("cuda" if request["device"] == "gpu" else "cpu"):
        model = Qwen3ForCausalLM(config)
    model.to(torch.float32 if small else torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    chance = random.Random(0)
    mean = 64 if request["device"] == "cpu" else 256
    rows = []
    for number in range(request["batch"] * (request["steps"] + WARM)):
        # A character is about a token of this tokenizer.
        length = min(2 * mean, max(8, round(chance.lognormvariate(0, 0.6) * mean * 0.8)))
        answer = "".join(chance.choice("etaoin shrdlu") for _ in range(length))
        turns = [("user", f"{number}?"), ("assistant", answer)]
        messages = [{"role": role, "content": text, "tool_calls": None} for role, text in turns]
        rows.append({"id": str(number), "text": None, "messages": messages, "rejected": None, "label": None})
        rows[-1] |= {"injected_corruption": None, "tools": None, "source": ""}
    write_rows(rows, folder / "rows")  # type: ignore[arg-type]
    return {}


def _job(request: dict[str, Any], name: str, learning_rate: float) -> Any:
    from tunery.spec import Compute, Sft
    from tunery.training.job import Job, RowSource

    folder = Path(request["folder"])
    spec = Sft(
        kind="sft",
        data="rows",
        model="base",
        epochs=1.0,
        learning_rate=learning_rate,
        global_batch_size=request["batch"],
        max_length=1024,
        tuner={"lora": {"rank": 16}},  # type: ignore[arg-type]
    )
    work = Path(tempfile.mkdtemp(dir=folder))
    (work / "out").mkdir()
    compute = Compute(
        workers=1, device=request["device"], precision=request["precision"], micro_batch_size=request["batch"]
    )
    return Job(
        stage=name,
        trial=name,
        spec=spec,
        seed=1,
        model={"pretrained": str(folder / "model"), "revision": None},
        data=(RowSource(folder / "rows"),),
        eval_data=(),
        out=work / "out",
        staging_dir=work,
        store=work,
        events=work / "events",
        compute=compute,
        started_at=time.time(),
    )


def alone(request: dict[str, Any]) -> dict[str, Any]:
    """Seconds of the steps after the first ones, by the clock of each step."""
    import torch

    torch.set_num_threads(1)
    from tunery.training.worker import train

    times: list[float] = []
    from tunery.workers.process_state import prepare_process

    prepare_process(request["device"], 1)
    from tunery.training import training_callback

    plain = training_callback.TrainingCallback.on_step_end

    def timed(self: Any, *arguments: Any, **more: Any) -> None:
        _wait(request)
        times.append(time.time())
        plain(self, *arguments, **more)

    training_callback.TrainingCallback.on_step_end = timed  # type: ignore[method-assign]
    train(_job(request, "alone", 1e-4), lambda metrics: None)
    return _measured(request, (times[-1] - times[WARM - 1]) / (len(times) - WARM))


def packed(request: dict[str, Any]) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    from tunery.training.packed.pack import Pack

    jobs = [_job(request, f"member{number}", 1e-4 * (number + 1)) for number in range(request["count"])]
    pack = Pack(jobs[0].model, request["device"], request["precision"], budget=request["budget"] or None)
    for job in jobs:
        pack.join(job, lambda metrics: None)
    for _ in range(WARM):
        pack.step()
    _wait(request)
    begin, steps = time.time(), 0
    while pack.members:
        pack.step()
        steps += 1
    _wait(request)
    return _measured(request, (time.time() - begin) / steps)


def _wait(request: dict[str, Any]) -> None:
    if request["device"] == "gpu":
        import torch

        torch.cuda.synchronize()


def _measured(request: dict[str, Any], seconds: float) -> dict[str, Any]:
    import resource

    import torch

    gpu = request["device"] == "gpu"
    peak = torch.cuda.max_memory_allocated() if gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "peak": peak, "device": torch.cuda.get_device_name() if gpu else "one core of a CPU"}


if __name__ == "__main__":
    arms = {"make": make, "alone": alone, "packed": packed}
    if len(sys.argv) == 3 and sys.argv[1] in arms:
        print(json.dumps(arms[sys.argv[1]](json.loads(sys.argv[2]))))
    else:
        main()
