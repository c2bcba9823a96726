"""How long does each kind of stage take to its first step on workers that are already running, and what GPU memory does
it leave behind?

    python benchmarks/stage_starts.py [--device gpu] [--workers 2] [--zero 2,3]

One run trains a tiny model with every kind of training, one after another on the same workers, then scores and
evaluates. `workers ready` is the start of the worker group: processes, imports, process group. The first training also
initializes CUDA libraries. The memory that stays allocated is the workspace of cuBLAS; it does not grow.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from ray import cloudpickle

from tunery.events.event_log import EventLog
from tunery.pipeline.compute import batch_sizes, resolve_compute
from tunery.pipeline.execute import execute
from tunery.pipeline.ray_session import RaySession
from tunery.pipeline.run_context import RunContext
from tunery.spec import Compute, load
from tunery.spec.graph import order, with_upstream
from tunery.store import Artifact, Store
from tunery.training.launch import WorkersLauncher

LORA = {"lora": {"rank": 4}}
ROWS = {"texts": ("texts", 120), "questions": ("questions", 80), "pairs": ("corrupted", 64), "prompts": ("prompts", 32)}
TRAIN = {"epochs": 1, "learning_rate": 1.0e-3, "global_batch_size": 8}
ONLINE = {
    **TRAIN,
    "data": "prompts",
    "model": "sft",
    "reward": "reward",
    "global_batch_size": 16,
    "max_length": 100,
    "sampling": {"max_new_tokens": 16},
}
STAGES: dict[str, dict[str, Any]] = {
    **{
        name: {"kind": "dataset", "source": "builtin:python-docs", "subset": subset, "split": "train", "limit": limit}
        for name, (subset, limit) in ROWS.items()
    },
    "base": {"kind": "pretrain", "data": "texts", "model": {"scratch": "tiny"}, "max_length": 128, **TRAIN},
    "sft": {"kind": "sft", "data": "questions", "model": "base", **TRAIN},
    "sft_lora": {"kind": "sft", "data": "questions", "model": "base", "tuner": LORA, **TRAIN},
    "reward": {"kind": "reward", "data": "pairs", "model": "sft", "tuner": LORA, **TRAIN},
    "classifier": {"kind": "classifier", "data": {"good": "questions", "bad": "texts"}, "model": "base", **TRAIN},
    "dpo": {"kind": "dpo", "data": "pairs", "model": "sft", **TRAIN},
    "kto": {"kind": "kto", "data": "pairs", "model": "sft", "tuner": LORA, **TRAIN},
    "grpo": {"kind": "grpo", "group_size": 4, **ONLINE},
    "rloo": {"kind": "rloo", "group_size": 4, "tuner": LORA, **ONLINE},
    "ppo": {"kind": "ppo", "minibatches": 2, **ONLINE},
    "ppo_lora": {"kind": "ppo", "minibatches": 2, "tuner": LORA, **ONLINE},
    "score": {"kind": "score", "data": "questions", "by": [{"perplexity": "base"}, {"ifd": "base"}]},
    "evaluate": {"kind": "evaluate", "models": ["base", "sft", "dpo"], "data": {"questions": "questions"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "gpu"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--zero", default="2", help="ZeRO stages, separated by commas")
    options = parser.parse_args()
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import this file
    for zero_stage in map(int, options.zero.split(",")):
        print(f"ZeRO-{zero_stage}")
        with tempfile.TemporaryDirectory() as folder:
            _run(Path(folder), Compute(workers=options.workers, device=options.device, zero_stage=zero_stage))


def _run(folder: Path, compute: Compute) -> None:
    file = folder / "starts.yaml"
    file.write_text(yaml.safe_dump({"name": "starts", "seed": 17, "stages": STAGES}))
    experiment, _ = load(file)
    log = EventLog(folder / "events" / "driver.jsonl")
    session = RaySession(log, folder)
    begin = time.time()
    compute, _ = resolve_compute(compute, session.start(compute), batch_sizes(experiment))
    print(f"Ray started      {time.time() - begin:6.1f} s")
    experiment = experiment.model_copy(update={"compute": compute})
    run_context = RunContext(Store(folder / "store"), folder, file)
    artifacts: dict[str, Artifact] = {}
    begin = time.time()
    _allocated(session, compute)
    print(f"workers ready    {time.time() - begin:6.1f} s\nstage              whole   first step   GPU memory left")
    for name in order(experiment.stages):
        own = experiment.model_copy(update={"stages": with_upstream(experiment.stages, [name])})
        done = {stage: artifact for stage, artifact in artifacts.items() if stage in own.stages}
        begin = time.time()
        artifacts |= execute(own, run_context, log, lambda stage: WorkersLauncher(session.workers, compute), done=done)
        seconds = time.time() - begin
        if experiment.stages[name].kind == "dataset":
            continue
        first_step = artifacts[name].runtime_stats.get("first_step_seconds")
        step = "" if first_step is None else f"{first_step:.1f} s"
        print(f"{name:14} {seconds:7.1f} s {step:>12} {_allocated(session, compute) / 1e6:15.0f} MB", flush=True)
    session.workers.close()
    session.stop()


def _allocated(session: RaySession, compute: Compute) -> float:
    """Bytes of GPU memory that torch has allocated on rank 0."""

    def job(argument: None, report: Any) -> None:
        import torch

        report({"bytes": float(torch.cuda.memory_allocated()) if torch.cuda.is_available() else 0.0})

    reports: list[dict[str, float]] = []
    session.workers.group(compute, ["tunery.training.sft"]).run(job, None, reports.append, 0)
    return reports[0]["bytes"]


if __name__ == "__main__":
    main()
