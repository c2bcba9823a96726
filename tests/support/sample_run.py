"""Synthetic event logs, identical every time: the quickstart with a search, interrupted once and resumed.

`sample_events` returns the complete log, `events_until` its first part, `failed_events` the log of a run whose training
failed, `rewarded_events` the log of another run, with policies trained on rewards. `write_run` writes events to a run
folder with one file per writer, as a real run does.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Event = dict[str, Any]

START = 1_790_000_000.0
METRIC = "eval.sft.domain.loss"
TEXT = """\
# Does dropping the least likely rows help a small model
# answer questions about Python's library?
name: quickstart
seed: 17
stages:
  docs:   {kind: dataset,  source: "builtin:python-docs"}
  base:   {kind: pretrain, data: docs, model: {scratch: tiny}, epochs: 2, learning_rate: 1e-3}
  scored: {kind: score,    data: docs, by: [{perplexity: base}]}
  clean:  {kind: select,   data: scored, keep: {perplexity: {keep_fraction: 0.8}}}
  sft:    {kind: sft,      data: clean, model: base, tuner: {lora: {rank: 16}}, learning_rate: auto}
  raw:    {kind: sft,      data: docs,  model: base, tuner: {lora: {rank: 16}}, learning_rate: auto}
  eval:   {kind: evaluate, models: [base, sft, raw], data: {domain: heldout, general: general}}
"""
STAGES = [
    {"name": "docs", "kind": "dataset", "inputs": []},
    {"name": "general", "kind": "dataset", "inputs": []},
    {"name": "base", "kind": "pretrain", "inputs": ["docs"]},
    {"name": "scored", "kind": "score", "inputs": ["docs", "base"]},
    {"name": "clean", "kind": "select", "inputs": ["scored"]},
    {"name": "sft", "kind": "sft", "inputs": ["clean", "base"]},
    {"name": "raw", "kind": "sft", "inputs": ["docs", "base"]},
    {"name": "eval", "kind": "evaluate", "inputs": ["base", "sft", "raw"]},
]
SPACE = {
    "sft.epochs": "one of 1, 2, 4",
    "sft.learning_rate": "log-uniform 1e-4 to 3e-3",
    "clean.keep.perplexity.keep_fraction": "one of 0.5, 0.8, 1.0",
}


def sample_events() -> list[Event]:
    """Return the complete log: interrupted once, resumed, with a search, comparison and end."""
    return _EventGenerator().complete()


def events_until(fraction: float) -> list[Event]:
    """Return the first part of the log, as read while the run is in progress."""
    events = sample_events()
    return events[: int(len(events) * fraction)]


def failed_events() -> list[Event]:
    """Return the log of a run whose `sft` ran out of GPU memory, before `raw` and `eval` started."""
    log = _EventGenerator()
    log.run_started()
    log.until_clean(resumed=False)
    log.emit("stage_started", stage="sft", kind="sft", fingerprint="f-sft", detail="LoRA rank 16")
    log.curve("sft", steps=40, planned=320, start=3.9, floor=3.1)
    log.emit(
        "stage_failed",
        stage="sft",
        kind="sft",
        message="rank 1 ran out of GPU memory at step 40",
        cause="micro_batch_size 64 needs 92.1 GiB, the GPU has 79.1 GiB",
        remedy="set compute.micro_batch_size to 32 or to auto",
        log="logs/sft/rank1.log",
    )
    log.emit("run_finished", state="failed", seconds=log.now - START, message="stage sft failed")
    return log.events


def rewarded_events() -> list[Event]:
    """Return the log of a run of policies: `ppo` with held-out prompts, `grpo` without; `wins` compares their
    responses."""
    log = _EventGenerator()
    stages = [
        {"name": "prompts", "kind": "dataset", "inputs": []},
        {"name": "ppo", "kind": "ppo", "inputs": ["prompts"]},
        {"name": "grpo", "kind": "grpo", "inputs": ["prompts"]},
        {"name": "wins", "kind": "win_rate", "inputs": ["ppo", "grpo", "prompts"]},
    ]
    log.emit("run_started", run="rewarded", file="rewarded.yaml", text="# Which policy?", stages=stages)
    log.dataset("prompts", rows=1_000, quarantined=0, injected_corruption={})
    log.policy("ppo", 32, log.ppo_step, PPO_FACTS, evaluated=True)
    log.policy("grpo", 20, log.grpo_step, GRPO_FACTS, evaluated=False)
    responses = {
        "base": {"response": "No idea.", "reward": 0.25},
        "ppo": {"response": "It is a <b>string</b>.", "reward": 4.0},
        "grpo": {"response": "A string.", "reward": 3.5},
    }
    log.finish("wins", "win_rate", 4.0, {"responses": [{"prompt": "What is `str`?", "responses": responses}]})
    log.emit("run_finished", state="done", seconds=log.now - START, message="")
    return log.events


PPO_FACTS: dict[str, Any] = {
    "num_responses": 1_024,
    "steps": 32,
    "eos_rate": 0.8125,
    "kl": 13.25,
    "eval_kl": 11.92,
    "first_reward": 1.125,
    "reward": 4.65,
    "eval_reward_before": 0.96875,
    "eval_reward": 4.609375,
    "shared_base": True,
    "weights_bytes": 15_000_000,
    "weights_bytes_separate": 51_200_000,
    "responses": [
        {
            "prompt": f"What is `{name}`?",
            "before": f"{name} {name} (",
            "after": f"{name} is a class.\nIt has methods.",
            "reward_before": 0.5,
            "reward_after": 4.0,
        }
        for name in ("str", "int", "list", "dict")
    ],
}
GRPO_FACTS: dict[str, Any] = {
    "steps": 20,
    "reward": 3.75,
    "kl": 0.125,
    "clipped_ratio": 0.25,
    "eval_reward": None,
    "loss": 0.01,
}


def write_run(folder: Path, events: list[Event]) -> Path:
    """Write `events` to a run folder, in one file per writer."""
    (folder / "events").mkdir(parents=True, exist_ok=True)
    files: dict[str, list[str]] = {}
    for event in events:
        worker = event["event"] in ("progress", "metrics") and event.get("stage")
        writer = "-".join(str(part) for part in (event.get("trial"), worker) if part) or "driver"
        files.setdefault(writer, []).append(json.dumps(event))
    for writer, lines in files.items():
        (folder / "events" / f"{writer}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


class _EventGenerator:
    """Generates the events of a run one after the other; `now` is the simulated time."""

    def __init__(self) -> None:
        self.now = START
        self.events: list[Event] = []
        self.random = random.Random(17)

    def emit(self, event: str, *, after: float = 0.2, **values: Any) -> None:
        self.now += after
        self.events.append({"t": round(self.now, 3), "event": event, **values})

    def complete(self) -> list[Event]:
        self.run_started()
        self.until_clean(resumed=True)
        sft_facts = self.train("sft", rows=3_200, steps=320, start=3.9, floor=3.05)
        raw_facts = self.train("raw", rows=4_000, steps=400, start=3.95, floor=3.28)
        assert sft_facts["eval_loss"] < raw_facts["eval_loss"]
        self.evaluate()
        self.search()
        self.run_finished()
        return self.events

    def run_started(self) -> None:
        self.emit(
            "run_started",
            run="quickstart",
            file="experiments/quickstart.yaml",
            text=TEXT,
            stages=STAGES,
            versions={
                "tunery": "0.1.0",
                "python": "3.11.9",
                "torch": "2.9.0",
                "ray": "2.51.0",
                "trl": "0.25.1",
            },
            command="tunery search experiments/quickstart.yaml",
        )
        self.emit("ray_started", after=4.1, seconds=4.1)

    def until_clean(self, *, resumed: bool) -> None:
        self.dataset(
            "docs",
            rows=4_000,
            quarantined=12,
            injected_corruption={"": 3_200, "shuffled": 400, "swapped": 250, "cut": 150},
        )
        self.dataset("general", rows=1_000, quarantined=0, injected_corruption={})
        self.emit("stage_started", stage="base", kind="pretrain", fingerprint="f-base", detail="tiny, from scratch")
        if resumed:
            self.curve("base", steps=130, planned=250, start=9.1, floor=3.6)
            self.emit("run_finished", state="interrupted", seconds=self.now - START, message="Ctrl-C")
            self.now += 600
            self.run_started()
            for name, rows in (("docs", 4_000), ("general", 1_000)):
                facts = next(e for e in self.events if e["event"] == "stage_finished" and e["stage"] == name)["facts"]
                self.emit(
                    "stage_finished",
                    stage=name,
                    kind="dataset",
                    fingerprint=f"f-{name}",
                    reused=True,
                    seconds=0.1,
                    facts=facts,
                )
                assert facts["rows"] == rows
            self.emit("stage_started", stage="base", kind="pretrain", fingerprint="f-base", detail="from step 100")
        self.curve("base", first=100 if resumed else 0, steps=250, planned=250, start=9.1, floor=3.6)
        self.finish(
            "base",
            "pretrain",
            70.4,
            self.training_facts(8_000, 250, 3.61, 3.74, resumed_from=100 if resumed else 0),
        )
        self.score()
        self.select()

    def dataset(self, name: str, *, rows: int, quarantined: int, injected_corruption: dict[str, int]) -> None:
        self.emit("stage_started", stage=name, kind="dataset", fingerprint=f"f-{name}", detail="python-docs")
        for done in range(500, rows + 1, 500):
            self.emit("progress", after=0.4, stage=name, done=done, total=rows, unit="rows")
        facts = {
            "rows": rows,
            "quarantined": quarantined,
            "row_format": "text",
            "source": "builtin:python-docs",
            "split": "train",
            "injected_corruption": injected_corruption,
        }
        self.finish(name, "dataset", rows / 1_250, facts)

    def curve(
        self,
        stage: str,
        *,
        steps: int,
        planned: int,
        start: float,
        floor: float,
        first: int = 0,
        trial: str = "",
    ) -> None:
        source = {"stage": stage, **({"trial": trial} if trial else {})}
        for step in range(first + 10, steps + 1, 10):
            loss = floor + (start - floor) * math.exp(-step / (planned / 5)) + self.random.gauss(0, 0.04)
            values = {
                "loss": loss,
                "learning_rate": 1e-3 * (1 - step / planned),
                "rows": step * 32,
                "tokens": step * 32 * 210,
                "tokens_per_second": 48_000 + self.random.gauss(0, 900),
                "grad_norm": 0.8 + 0.1 * self.random.random(),
            }
            self.emit("metrics", after=3.1, step=step, values=values, **source)
            self.emit("progress", after=0.01, done=step, total=planned, unit="steps", **source)
            if step % 50 == 0:
                held_out = floor + 0.13 + (start - floor) * math.exp(-step / (planned / 5))
                self.emit(
                    "metrics",
                    after=0.6,
                    step=step,
                    values={"eval_loss": held_out, "rows": step * 32},
                    **source,
                )

    def training_facts(self, rows: int, steps: int, loss: float, eval_loss: float, **more: Any) -> dict[str, Any]:
        return {
            "rows": rows,
            "tokens": rows * 210,
            "steps": steps,
            "epochs": 2,
            "global_batch_size": 32,
            "learning_rate": 1e-3,
            "parameters": 12_582_912,
            "trainable": 786_432,
            "truncated": 14,
            "resolved": {
                "learning_rate": {
                    "value": 1e-3,
                    "rule": "LoRA: 10 x the full fine-tuning rate for 12.6M parameters",
                },
                "global_batch_size": {"value": 32, "rule": "3,200 rows / 100 steps an epoch"},
            },
            "loss": loss,
            "eval_loss": eval_loss,
            "tokens_per_second": 48_210.0,
            "first_step_seconds": 5.2,
            "workers": 2,
            "zero_stage": 2,
            "dtype": "bfloat16",
            "device": "NVIDIA H200",
            "resumed_from": 0,
            "peak_memory_bytes": 4_321_987_654,
            **more,
        }

    def finish(self, stage: str, kind: str, seconds: float, facts: dict[str, Any], **more: Any) -> None:
        self.emit(
            "stage_finished",
            stage=stage,
            kind=kind,
            fingerprint=f"f-{stage}",
            reused=False,
            seconds=seconds,
            artifact=f"store/artifacts/f-{stage}",
            facts=facts,
            **more,
        )

    def score(self) -> None:
        self.emit(
            "stage_started",
            stage="scored",
            kind="score",
            fingerprint="f-scored",
            detail="perplexity under base",
        )
        for done in range(400, 4_001, 400):
            self.emit("progress", after=0.7, stage="scored", done=done, total=4_000, unit="rows")
        facts = {
            "rows_in": 4_000,
            "rows_out": 4_000,
            "tokens": 840_000,
            "truncated": 14,
            "tokens_per_second": 121_000.0,
            "scores": {"perplexity": self.histogram()},
        }
        self.finish("scored", "score", 7.4, facts)

    def histogram(self) -> dict[str, Any]:
        bins, low, high = 32, math.log(12), math.log(900)
        edges = [math.exp(low + (high - low) * i / bins) for i in range(bins + 1)]
        counts, corrupted = [0] * bins, [0] * bins
        for centre, width, rows, is_corrupted in ((3.75, 0.42, 3_200, False), (5.2, 0.5, 800, True)):
            for _ in range(rows):
                index = int((self.random.gauss(centre, width) - low) / (high - low) * bins)
                index = min(max(index, 0), bins - 1)
                counts[index] += 1
                corrupted[index] += is_corrupted
        by_kind = {"shuffled": 0.991, "swapped": 0.874, "cut": 0.803}
        return {
            "histogram": {"edges": edges, "counts": counts, "corrupted": corrupted},
            "median": 48.3,
            "auc": 0.927,
            "auc_by_kind": by_kind,
        }

    def select(self) -> None:
        self.emit("stage_started", stage="clean", kind="select", fingerprint="f-clean", detail="")
        quality = {
            "total": 800,
            "dropped": 604,
            "precision": 0.755,
            "recall": 0.755,
            "auc": 0.927,
            "random_precision": 0.2,
            "random_recall": 0.2,
        }
        rules = [{"score": "perplexity", "rule": "keep_fraction 0.8", "thresholds": [105.0], "dropped": 800}]
        facts = {"rows_in": 4_000, "kept": 3_200, "dropped": 800, "rules": rules, "injected_corruption": quality}
        self.finish("clean", "select", 0.6, facts)

    def train(self, stage: str, *, rows: int, steps: int, start: float, floor: float) -> dict[str, Any]:
        self.emit(
            "stage_started",
            after=1.1,
            stage=stage,
            kind="sft",
            fingerprint=f"f-{stage}",
            detail="LoRA rank 16",
        )
        began = self.now
        self.curve(stage, steps=steps, planned=steps, start=start, floor=floor)
        facts = self.training_facts(rows, steps, floor + 0.01, floor + 0.14)
        self.finish(stage, "sft", self.now - began, facts)
        return facts

    def policy(
        self,
        stage: str,
        steps: int,
        metrics_at: Callable[[float], dict[str, float]],
        facts: dict[str, Any],
        *,
        evaluated: bool,
    ) -> None:
        self.emit("stage_started", stage=stage, kind=stage, fingerprint=f"f-{stage}", detail="")
        began = self.now
        for step in range(steps + 1):
            done, rows = step / steps, float(step * 32)
            if step:
                self.emit("metrics", after=5.0, stage=stage, step=step, values={**metrics_at(done), "rows": rows})
                self.emit("progress", after=0.01, stage=stage, done=step, total=steps, unit="steps")
            if evaluated and step % 8 == 0:
                values = {
                    "eval_reward": 0.97 + 3.64 * done,
                    "eval_kl": 11.92 * done,
                    "eval_response_length": 36 + 12 * done,
                    "eval_eos_rate": 0.4 + 0.4 * done,
                    "rows": rows,
                }
                self.emit("metrics", after=1.0, stage=stage, step=step, values=values)
        self.finish(stage, stage, self.now - began, dict(facts))  # a copy, since tests modify what they receive

    def ppo_step(self, done: float) -> dict[str, float]:
        """Return the metrics of a PPO step; `done` is the fraction of the training."""
        return {
            "reward": 1.1 + 3.6 * done + self.random.gauss(0, 0.2),
            "reward_std": 1.2 - 0.8 * done,
            "kl": 12.6 * done,
            "kl_coefficient": 0.05,
            "entropy": 6.3 - 0.3 * done,
            "policy_loss": -0.02,
            "value_loss": 0.4 * (1 - done),
            "clip_fraction": 0.07,
            "approximate_kl": 0.006,
            "grad_norm": 0.8,
            "explained_variance": 2 * done - 1.4,
            "returns": 1 + 3.5 * done,
            "response_length": 36 + 12 * done,
            "eos_rate": 0.4 + 0.4 * done,
            "sampler_logprob_diff": 2e-7,
            "learning_rate": 3e-4,
            "rollout_tokens_per_second": 2_100.0,
            "score_tokens_per_second": 3_400.0,
            "update_tokens_per_second": 1_700.0,
            "memory_gb": 0.9,
        }

    def grpo_step(self, done: float) -> dict[str, float]:
        """Return the metrics of a GRPO step; `done` is the fraction of the training."""
        own = {"reward": 1.1 + 2.7 * done, "loss": 0.01, "kl": 0.125 * done, "clipped_ratio": 0.5 - 0.25 * done}
        return {**own, "entropy": 6.3, "clip_fraction": 0.02, "response_length": 40.0}

    def evaluate(self) -> None:
        self.emit("stage_started", stage="eval", kind="evaluate", fingerprint="f-eval", detail="3 models on 2 sets")
        losses = {"base": (3.742, 4.105), "sft": (3.191, 3.987), "raw": (3.421, 4.012)}
        results = [
            {
                "model": model,
                "set": name,
                "loss": loss,
                "perplexity": math.exp(loss),
                "tokens": 61_240,
                "rows": 400,
            }
            for model, pair in losses.items()
            for name, loss in zip(("domain", "general"), pair, strict=True)
        ]
        self.finish("eval", "evaluate", 9.8, {"results": results})

    def search(self) -> None:
        self.emit(
            "search_started",
            metric=METRIC,
            mode="min",
            trials=12,
            scheduler="asha",
            space=SPACE,
            max_concurrent=2,
            reason="2 GPUs, one a trial",
        )
        lanes = [self.now, self.now + 1.5]
        best: tuple[float, str, dict[str, Any]] = (math.inf, "", {})
        for number in range(12):
            lane = lanes.index(min(lanes))
            self.now = lanes[lane]
            trial, overrides, value = self.trial(number)
            lanes[lane] = self.now
            if value is not None and value < best[0]:
                best = (value, trial, overrides)
        self.now = max(lanes)
        self.events.sort(key=lambda event: event["t"])
        self.emit("search_finished", best=best[1], best_overrides=best[2], value=best[0], seconds=480.0)

    def trial(self, number: int) -> tuple[str, dict[str, Any], float | None]:
        """Generate one trial. Returns its name, overrides and value; the value is None unless the trial is done."""
        trial, quantile = f"t{number:02d}", self.random.choice([0.5, 0.8, 1.0])
        overrides: dict[str, Any] = {
            "sft.epochs": self.random.choice([1, 2, 4]),
            "sft.learning_rate": 10 ** self.random.uniform(-4, -2.52),
            "clean.keep.perplexity.keep_fraction": quantile,
        }
        distance = abs(math.log10(overrides["sft.learning_rate"]) + 3.1)
        floor = 3.0 + 0.4 * distance + 0.12 * abs(quantile - 0.8) + 0.05 / overrides["sft.epochs"]
        state = "failed" if number == 7 else "stopped" if floor > 3.21 else "done"
        value = None if state == "failed" else floor + 0.13
        self.emit("trial_started", trial=trial, overrides=overrides)
        began, kept = self.now, int(4_000 * quantile)
        cut = {0.5: 48.3, 0.8: 105.0, 1.0: 900.0}[quantile]
        rules = [
            {"score": "perplexity", "rule": f"keep_fraction {quantile}", "thresholds": [cut], "dropped": 4_000 - kept}
        ]
        facts = {"rows_in": 4_000, "kept": kept, "dropped": 4_000 - kept, "rules": rules, "injected_corruption": None}
        self.finish("clean", "select", 0.4, facts, trial=trial)
        self.emit(
            "stage_started",
            after=0.8,
            trial=trial,
            stage="sft",
            kind="sft",
            fingerprint=f"f-{trial}",
            detail="",
        )
        trained, planned = self.now, 80 * overrides["sft.epochs"]
        steps = planned if state == "done" else max(60, planned // 2)
        self.curve("sft", trial=trial, steps=steps, planned=planned, start=3.9, floor=floor)
        error = "loss is NaN at step 60" if state == "failed" else ""
        if state == "failed":
            failure: dict[str, Any] = {
                "message": error,
                "cause": "the learning rate diverged",
                "remedy": "",
                "log": "",
            }
            self.emit("stage_failed", trial=trial, stage="sft", kind="sft", **failure)
        elif state == "done":
            self.finish(
                "sft",
                "sft",
                self.now - trained,
                self.training_facts(kept, steps, floor, floor + 0.13),
                trial=trial,
            )
        outcome: dict[str, Any] = {
            "overrides": overrides,
            "state": state,
            "value": value,
            "seconds": self.now - began,
            "error": error,
        }
        self.emit("trial_finished", trial=trial, **outcome)
        return trial, overrides, value if state == "done" else None

    def run_finished(self) -> None:
        columns = ["model", "rows", "domain loss", "domain perplexity", "general loss", "against raw"]
        rows = [
            ["base", 4_000, 3.742, 42.18, 4.105, "+0.321"],
            ["raw", 4_000, 3.421, 30.6, 4.012, ""],
            ["sft", 3_200, 3.191, 24.31, 3.987, "−0.230"],
        ]
        notes = [
            "one seed: a difference under 0.02 is noise",
            "W&B (offline): wandb sync runs/quickstart/wandb",
        ]
        self.emit("comparison", columns=columns, rows=rows, notes=notes)
        self.emit(
            "overhead",
            first_step_seconds=14.2,
            ray_start_seconds=4.1,
            between_stages_seconds=[0.4, 0.2, 0.3, 1.1, 1.1, 0.2],
            stage_launch_seconds={"base": 5.2, "sft": 4.9, "raw": 4.8},
        )
        began = [event["t"] for event in self.events if event["event"] == "run_started"][-1]
        self.emit("run_finished", state="done", seconds=self.now - began, message="")
