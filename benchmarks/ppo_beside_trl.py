"""Is our PPO right, does it learn as well, how fast is it, beside the last that TRL had (1.12.0)? On CPU.

    python benchmarks/ppo_beside_trl.py --peer PYTHON [--seeds 3] [--steps 20] [--threads 1]
                                        [--only digits,curves,speed] [--folder KEPT]

PYTHON is the interpreter of an environment of its own (benchmarks/ppo_peer.py says how it is made). Three parts:

    digits  TRL trains a step and keeps what it computed. On the same answers and weights: log-probabilities, reference,
            values, token rewards, advantages, returns, and both losses of every micro batch, as largest differences.
            TRL puts an answer's score one place behind its end, and asks the value model there once more: with the
            switch `late` ours does the same, and without it what differs on purpose is told too
    curves  a reward that counts a token, the same prompts, model, number of answers and settings: mean reward of the
            last five steps, for each seed
    speed   seconds of a step without the first, ours and theirs in turn, for three sorts of answers: those of a model
            that was taught to answer, which end by themselves, with room for nearly all of them (160 tokens) and with
            little (48), and those of the same model when it may not end (`min_new_tokens`; for TRL no stop token),
            where nothing can be saved

Prints tables, and ratios theirs / ours.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from tunery.events.event_log import EventLog
from tunery.models.encode import encode_prompts
from tunery.pipeline.compute import Hardware, resolve_compute
from tunery.pipeline.execute import execute
from tunery.pipeline.run_context import RunContext
from tunery.spec import Compute, Ppo
from tunery.spec.loader import parse
from tunery.spec.yaml_source import read_yaml
from tunery.store import Store
from tunery.store.rows import read_rows
from tunery.training.job import Job, RowSource
from tunery.training.ppo.advantages import generalized_advantages, whiten
from tunery.training.ppo.kl import kl_per_token, token_rewards
from tunery.training.ppo.losses import policy_loss, value_loss
from tunery.training.ppo.models import LanguageModel, ScalarHead, ScalarModel
from tunery.training.ppo.rollouts import Rollouts, micro_batch
from tunery.workers.cluster_resources import NodeResources

PEER = Path(__file__).with_name("ppo_peer.py")
EXPERIMENT = """
name: ppo-beside-trl
seed: 17
stages:
  texts:     {kind: dataset, source: "builtin:python-docs", subset: texts, split: train, limit: 1500}
  questions: {kind: dataset, source: "builtin:python-docs", subset: questions, split: train, limit: 600}
  prompts:   {kind: dataset, source: "builtin:python-docs", subset: prompts, split: validation, limit: 256}
  base: {kind: pretrain, data: texts, model: {scratch: tiny}, epochs: 1, learning_rate: 2e-3, global_batch_size: 4,
         max_length: 256}
  sft:  {kind: sft, data: questions, model: base, epochs: 1, learning_rate: 2e-3, global_batch_size: 8}
compute: {workers: 1, zero_stage: 0}
"""
ENVIRONMENT = dict(os.environ)
"""Before a training in this process adds what would make the peer look for DeepSpeed."""
ANSWERS = 32
"""A step."""
SETTINGS = {"ppo_epochs": 4, "minibatches": 4, "kl": 0.05, "learning_rate": 3e-4}
COUNT = "def reward(prompts, responses):\n    return [float(response.count({piece!r})) for response in responses]\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="digits,curves,speed")
    parser.add_argument("--folder", type=Path, help="keep what is made there, and use what is there")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options.folder or Path(scratch), options.peer, options.threads)
        bench.prepare()
        parts = options.only.split(",")
        if "digits" in parts:
            digits(bench)
        if "curves" in parts:
            curves(bench, options.seeds, options.steps)
        if "speed" in parts:
            speed(bench)


class Bench:
    """Models and prompts for both, and a run of either in a process of its own."""

    def __init__(self, folder: Path, peer: str, threads: int) -> None:
        self.folder, self.peer, self.threads = folder.resolve(), peer, threads

    def prepare(self) -> None:
        """policy: taught to answer; reward, value: on it, with heads of random weights."""
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "experiment.yaml"
        file.write_text(EXPERIMENT)
        experiment = parse(read_yaml(EXPERIMENT, str(file)))
        compute, _ = resolve_compute(experiment.compute, Hardware([NodeResources(2)], "here"))
        where = RunContext(Store(self.folder / "store"), self.folder / "run", file)
        log = EventLog(where.events / "made.jsonl")
        made = execute(experiment.model_copy(update={"compute": compute}), where, log)
        self.rows = made["prompts"].path
        self.policy = made["sft"].path / "model"
        tokenizer = AutoTokenizer.from_pretrained(self.policy)
        self.prompts = [prompt.ids for prompt in encode_prompts(list(read_rows(self.rows)), tokenizer)]
        for name, seed in (("reward", 1), ("value", 2)):
            set_seed(seed)
            model = AutoModelForSequenceClassification.from_pretrained(self.policy, num_labels=1)
            model.save_pretrained(self.folder / name)
            tokenizer.save_pretrained(self.folder / name)

    def counted_token(self) -> tuple[int, str]:
        """A frequent token whose text is part of no other's, so that counting it in tokens and in text is the same."""
        tokenizer = AutoTokenizer.from_pretrained(self.policy)
        texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
        alone = [
            t for t, text in texts.items() if len(text) > 2 and sum(text in other for other in texts.values()) == 1
        ]
        words = [token for row in read_rows(self._questions()) for token in _answer(row, tokenizer)]
        token = max(alone, key=words.count)
        return token, texts[token]

    def _questions(self) -> Path:
        return next(
            path
            for path in (self.folder / "store" / "artifacts").glob("dataset-*")
            if json.loads((path / "manifest.json").read_text())["facts"]["rows"] == 600
        )

    def theirs(self, command: str, seed: int, steps: int, reward: Any, ended: bool = True, **ppo: Any) -> Any:
        settings = {
            "policy": str(self.policy),
            "value": str(self.folder / "value"),
            "reward": reward,
            "prompts": self.prompts,
            "steps": steps,
            "seed": seed,
            "threads": self.threads,
            "ppo": {
                "per_device_train_batch_size": ANSWERS,
                "num_mini_batches": SETTINGS["minibatches"],
                "num_ppo_epochs": SETTINGS["ppo_epochs"],
                "kl_coef": SETTINGS["kl"],
                "learning_rate": SETTINGS["learning_rate"],
                "response_length": 48,
                "temperature": 1.0,
                "use_cpu": True,
                **({"stop_token": "eos"} if ended else {}),
                **ppo,
            },
        }
        out = self.folder / ("recorded" if command == "record" else f"theirs-{seed}.json")
        told = self.folder / "settings.json"
        told.write_text(json.dumps(settings))
        _run([self.peer, str(PEER), command, str(told), str(out)])
        return out if command == "record" else json.loads(out.read_text())

    def ours(self, seed: int, steps: int, piece: str, new_tokens: int = 48, min_new_tokens: int = 0) -> Any:
        """Rewards, lengths and seconds of each step."""
        (self.folder / "count.py").write_text(COUNT.format(piece=piece))
        out = self.folder / f"ours-{seed}.json"
        told = {"seed": seed, "steps": steps, "threads": self.threads}
        told |= {"min_new_tokens": min_new_tokens, "new_tokens": new_tokens}
        told |= {"rows": str(self.rows), "policy": str(self.policy), "prompts": len(self.prompts)}
        _run([sys.executable, __file__, "ours", json.dumps(told), str(out)])
        return json.loads(out.read_text())


def _answer(row: dict[str, Any], tokenizer: Any) -> list[int]:
    tokens: list[int] = tokenizer(row["messages"][-1]["content"])["input_ids"]
    return tokens


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])[:300]}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def train_ours(told: dict[str, Any], out: Path) -> None:
    """In a process of its own: a training as a worker runs it."""
    from tunery.training.ppo import ppo_worker
    from tunery.workers.process_state import prepare_process

    prepare_process("cpu", told["threads"])
    from tunery.training.ppo.trainer import PpoTrainer

    steps: list[dict[str, float]] = []
    plain = PpoTrainer.step

    def step(self: PpoTrainer, rows: Any) -> dict[str, float]:
        begin, cpu = time.perf_counter(), time.process_time()
        found = plain(self, rows)
        seconds = {"seconds": time.perf_counter() - begin, "cpu_seconds": time.process_time() - cpu}
        steps.append({**found, **seconds, **{f"{k}_seconds": v for k, v in self.phase_stats.seconds.items()}})
        return found

    PpoTrainer.step = step  # type: ignore[method-assign]
    spec = Ppo.model_validate(
        {
            "kind": "ppo",
            "data": "prompts",
            "model": "sft",
            "reward": "count",
            "epochs": told["steps"] * ANSWERS / told["prompts"],
            "learning_rate": SETTINGS["learning_rate"],
            "schedule": "linear",
            "warmup": 0.0,
            "max_grad_norm": 1e9,  # TRL's PPO clips nothing
            "global_batch_size": ANSWERS,
            "minibatches": SETTINGS["minibatches"],
            "ppo_epochs": SETTINGS["ppo_epochs"],
            "max_length": 512,
            "kl": {"coefficient": SETTINGS["kl"]},
            "sampling": {"max_new_tokens": told["new_tokens"], "min_new_tokens": told["min_new_tokens"]},
        }
    )
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        (work / "out").mkdir()
        job = Job(
            stage="ppo",
            trial="",
            spec=spec,
            seed=told["seed"],
            model={"pretrained": told["policy"], "revision": None},
            data=(RowSource(Path(told["rows"])),),
            eval_data=(),
            reward={"python": str(out.parent / "count.py"), "function": "reward"},
            out=work / "out",
            staging_dir=work,
            store=work,
            events=work / "events",
            compute=Compute(workers=1, device="cpu", zero_stage=0, cpus_per_worker=told["threads"]),
            started_at=time.time(),
        )
        ppo_worker.train(job, lambda metrics: None)
    out.write_text(json.dumps({"steps": steps}))


def digits(bench: Bench) -> None:
    """The largest differences on the same answers."""
    folder = bench.theirs("record", 17, 1, str(bench.folder / "reward"), missing_eos_penalty=0.25)
    kept = load_file(folder / "step.safetensors")
    tokenizer = AutoTokenizer.from_pretrained(bench.policy)
    answers = [
        row[: int(end) + 1].tolist() for row, end in zip(kept["responses"], kept["sequence_lengths"], strict=True)
    ]
    prompts = [[token for token in row.tolist() if token != tokenizer.pad_token_id] for row in kept["queries"]]
    rollouts = Rollouts(list(range(len(answers))), prompts, answers, [False] * len(answers), [])
    batch = micro_batch(rollouts, range(len(answers)), torch.device("cpu"))
    width = kept["responses"].shape[1]
    mask_bt, later_bt = ~kept["padding_mask"].bool(), ~kept["padding_mask_p1"].bool()

    def spread(values_n: torch.Tensor) -> torch.Tensor:
        whole_bt = torch.zeros(len(answers), width)
        whole_bt[mask_bt] = values_n
        return whole_bt

    def off(ours: torch.Tensor, theirs: torch.Tensor, where: torch.Tensor) -> float:
        return float((ours - theirs)[where].abs().max())

    with torch.no_grad():
        before = folder / "before"
        policy = LanguageModel(AutoModelForCausalLM.from_pretrained(before / "policy", dtype=torch.float32).eval())
        value = _backbone(before / "value")
        reward = _backbone(bench.folder / "reward")
        reference = LanguageModel(AutoModelForCausalLM.from_pretrained(bench.policy, dtype=torch.float32).eval())
        log_probs_bt = spread(policy(batch, 1.0)[0])
        reference_bt = spread(reference(batch, 1.0)[0])
        values_bt = spread(value(batch.ids_bs, batch.state_indices_n))
        scores_b = reward(batch.ids_bs, batch.last_b)
        behind_b = value(batch.ids_bs, batch.last_b)
    cut_off_b = torch.tensor([tokenizer.eos_token_id not in answer for answer in answers])
    scores_b = scores_b - 0.25 * cut_off_b
    # The value that TRL asks for behind the end.
    behind_bt = values_bt.clone()
    ends_b = mask_bt.sum(1)
    room_b = ends_b < width
    behind_bt[room_b, ends_b[room_b]] = behind_b[room_b]
    kl_bt = kl_per_token(log_probs_bt, reference_bt, "k1")
    # TRL puts the score one position after the last token, or on the last token if the row is full.
    score_index_b = mask_bt.sum(dim=1).clamp(max=mask_bt.shape[1] - 1)
    penalties_bt = torch.where(mask_bt, -0.05 * kl_bt, 0.0)
    rewards_bt = penalties_bt.scatter_add(1, score_index_b[:, None], scores_b[:, None].to(penalties_bt))
    raw_bt, returns_bt = generalized_advantages(rewards_bt, behind_bt, later_bt, 1.0, 0.95)
    advantages_bt = whiten(raw_bt, mask_bt)
    found = {
        "log-probabilities": off(log_probs_bt, kept["logprobs"], mask_bt),
        "reference log-probabilities": off(reference_bt, kept["ref_logprobs"], mask_bt),
        "values": off(behind_bt, kept["values"], later_bt),
        "scores": float((scores_b - kept["scores"]).abs().max()),
        "token rewards": off(rewards_bt, kept["rewards"], later_bt),
        "advantages": off(advantages_bt, kept["advantages"], mask_bt),
        "returns": off(returns_bt, kept["returns"], later_bt),
    }
    policies, values = [], []
    count = sum(name.startswith("micro.") and name.endswith(".pg_loss") for name in kept)
    for number in range(count):
        rows = kept[f"micro.{number}.micro_batch_inds"]
        new_bt, seen_bt = kept[f"micro.{number}.new_logprobs"], kept[f"micro.{number}.vpred"]
        told = policy_loss(new_bt, kept["logprobs"][rows], advantages_bt[rows], 0.2)
        policies.append(float((told.loss[mask_bt[rows]].mean() - kept[f"micro.{number}.pg_loss"]).abs()))
        loss_bt = value_loss(seen_bt, behind_bt[rows], returns_bt[rows], 0.2)
        values.append(float((loss_bt[later_bt[rows]].mean() - kept[f"micro.{number}.vf_loss"]).abs()))
    found |= {f"policy loss ({count} micro batches)": max(policies), f"value loss ({count} micro batches)": max(values)}
    print(f"\nThe same answers ({len(answers)}, {int(mask_bt.sum())} tokens): largest differences from TRL 1.12.0")
    for name, difference in found.items():
        print(f"  {name:34} {difference:.1e}  {'agrees' if difference < 1e-5 else 'DIFFERS'}")
    ours_bt, _ = generalized_advantages(token_rewards(scores_b, kl_bt, mask_bt, 0.05), values_bt, mask_bt, 1.0, 0.95)
    differs = off(whiten(ours_bt, mask_bt), kept["advantages"], mask_bt)
    print(f"  on purpose: score on the last token, not behind it: advantages differ by up to {differs:.2f}")


def _backbone(folder: Path) -> ScalarModel:
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    return ScalarModel(model.base_model, ScalarHead(model.score.in_features).load_from(model.score, 0.0, 1.0))


def curves(bench: Bench, seeds: int, steps: int) -> None:
    token, piece = bench.counted_token()
    print(
        f"\nA reward that counts {piece!r} (token {token}): {steps} steps of {ANSWERS} answers, mean of the last five"
    )
    print("  seed   first    ours  theirs    KL ours  KL theirs")
    last: list[tuple[float, float]] = []
    for seed in range(17, 17 + seeds):
        ours = bench.ours(seed, steps, piece)["steps"]
        theirs = bench.theirs("train", seed, steps, {"count": token})["steps"]
        means = [statistics.mean(step[key] for step in run[-5:]) for run, key in ((ours, "reward"), (theirs, "score"))]
        kls = [statistics.mean(step["kl"] for step in run[-5:]) for run in (ours, theirs)]
        last.append((means[0], means[1]))
        print(f"  {seed:4} {ours[0]['reward']:7.2f} {means[0]:7.2f} {means[1]:7.2f} {kls[0]:10.2f} {kls[1]:10.2f}")
    won, lost = (statistics.mean(column) for column in zip(*last, strict=True))
    print(f"  mean          {won:7.2f} {lost:7.2f}")


def speed(bench: Bench) -> None:
    token, piece = bench.counted_token()
    print(f"\nSeconds a step of {ANSWERS} answers, {bench.threads} thread(s)")
    print("  answers                  length   ours  theirs   theirs / ours (CPU seconds)   phases ours | theirs")
    arms = (("end, at most 160", True, 160), ("end, at most 48", True, 48), ("may not end before 48", False, 48))
    for name, ended, most in arms:
        pairs = []
        for repeat in range(3):
            seed = 17 + repeat
            ours = bench.ours(seed, 5, piece, most, 0 if ended else most)["steps"][1:]
            theirs = bench.theirs("train", seed, 5, {"count": token}, ended, response_length=most)["steps"][1:]
            pairs.append((ours, theirs))

        def median(side: int, key: str, pairs: list[Any] = pairs) -> float:
            return statistics.median(step[key] for pair in pairs for step in pair[side])

        wall = median(1, "seconds") / median(0, "seconds")
        cpu = median(1, "cpu_seconds") / median(0, "cpu_seconds")
        mine = " ".join(f"{median(0, f'{key}_seconds'):.2f}" for key in ("rollout", "score", "update"))
        other = " ".join(f"{median(1, f'{key}_seconds'):.2f}" for key in ("generate", "rate", "update"))
        print(
            f"  {name:24} {median(0, 'response_length'):6.1f} "
            f"{median(0, 'seconds'):6.2f} {median(1, 'seconds'):7.2f} "
            f"{wall:9.2f} ({cpu:.2f}) {'':14} {mine} | {other}"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["ours"]:
        train_ours(json.loads(sys.argv[2]), Path(sys.argv[3]))
    else:
        main()
