"""Run a training stage, by Ray Train, in this process, or in a pack."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping
from typing import Any

from tunery.errors import Stopped
from tunery.interrupt import interruptible
from tunery.models.load import source_of
from tunery.models.reward_functions import reward_origin
from tunery.spec import PositiveNegative, Ppo, ReviewLabels, Scratch, Training
from tunery.spec.trainings import data_refs
from tunery.store import Artifact, StageContext, StageResult
from tunery.store.rows import REVIEWED_DIR
from tunery.training.auto import resolve
from tunery.training.checkpoints import seed_from
from tunery.training.job import Job, Report, RowSource
from tunery.training.packed.pack_server import train_packed

Data = str | PositiveNegative | ReviewLabels | dict[str, float]
STOPPED_FILE = "stopped"
"""Written to the work folder by workers that were stopped."""


def run_training(context: StageContext) -> StageResult:
    """Train a model. Facts: rows, tokens, steps, losses and resolved `auto` values. Measured: speed, memory, time to
    the first step."""
    spec = context.spec
    assert isinstance(spec, Training)
    resolved_spec, resolved = resolve(spec, _row_count(spec.data, context.inputs))
    paths = {name: item.path for name, item in context.inputs.items()}
    reward, ptx = getattr(spec, "reward", None), getattr(spec, "ptx", None)
    model: dict[str, Any]
    if isinstance(spec.model, Scratch):
        model = {"scratch": spec.model.scratch}
    else:
        model = source_of(spec.model, paths, context.folder)
    workers = context.compute.workers
    assert workers != "auto", "resolved by the runner"
    job = Job(
        stage=context.name,
        trial=context.trial,
        spec=resolved_spec,
        seed=context.seed,
        model=model,
        rows=_row_sources(spec.data, context.inputs),
        eval_rows=_row_sources(spec.eval_data, context.inputs) if spec.eval_data is not None else (),
        reward=None if reward is None else reward_origin(reward, paths, context.folder),
        ptx_rows=_row_sources(ptx.data, context.inputs) if ptx is not None else (),
        out=context.out,
        work=context.work,
        store=context.store,
        events=context.events,
        compute=context.compute,
        workers=workers,
        started=time.time(),
        stop=context.stop,
        checkpoint_dir=context.kept,
        resume_from=context.begins_with,
    )
    if job.resume_from is not None:
        seed_from(job.resume_from, job.work / "checkpoints")
    if context.desk is not None:
        train_packed(job, context.desk, context.report)
    elif context.in_process:
        _train_in_process(job, context.report)
    else:
        _train_on_workers(job, context)
    outcome = json.loads((context.work / "outcome.json").read_text())
    shutil.rmtree(context.work / "checkpoints", ignore_errors=True)
    resolved_values = {item.field: {"value": item.value, "rule": item.rule} for item in resolved}
    return StageResult({**outcome["facts"], "resolved": resolved_values}, outcome["measured"])


def _row_sources(data: Data, inputs: Mapping[str, Artifact]) -> tuple[RowSource, ...]:
    """Return the folders of the rows, with the label of each if the stage defines it."""
    if isinstance(data, dict):
        return tuple(RowSource(inputs[stage].path) for stage in data)
    if isinstance(data, PositiveNegative):
        return RowSource(inputs[data.good].path, True), RowSource(inputs[data.bad].path, False)
    if isinstance(data, ReviewLabels):
        return (RowSource(inputs[data.review].path / REVIEWED_DIR),)
    return (RowSource(inputs[data].path),)


def _row_count(data: Data, inputs: Mapping[str, Artifact]) -> int:
    fact = "decided" if isinstance(data, ReviewLabels) else "rows"
    return sum(int(inputs[stage].facts[fact]) for stage in data_refs(data).values())


def train(job: Job, report: Report) -> None:
    """Train in each worker, by PPO's own loop or by transformers' Trainer."""
    if isinstance(job.spec, Ppo):
        from tunery.training.ppo.ppo_worker import train as loop
    else:
        from tunery.training.worker import train as loop
    loop(job, report)


def _train_on_workers(job: Job, context: StageContext) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    compute = context.compute
    gpu = compute.device == "gpu"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "report": bool(context.callbacks)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=job.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": compute.cpus_per_worker} | ({"GPU": 1} if gpu else {}),
        ),
        run_config=RunConfig(
            # A reused name would make Ray resume from its own state; our checkpoints are in the work folder.
            name=f"{job.work.name}-{time.time_ns()}",
            storage_path=str(context.logs / "ray-train"),
            failure_config=FailureConfig(max_failures=compute.max_failures, controller_failure_limit=3),
            callbacks=list(context.callbacks),
        ),
    )
    (job.work / STOPPED_FILE).unlink(missing_ok=True)  # of an earlier attempt
    interruptible(trainer.fit)
    if (job.work / STOPPED_FILE).exists():
        raise Stopped("stopped while it trained")


def _worker(config: dict[str, Any]) -> None:
    import ray.train

    def report(metrics: dict[str, float]) -> None:
        if config["report"]:
            ray.train.report(metrics)

    # All ranks stop at the same step. If Stopped were raised, Ray Train would retry the run as a failure.
    try:
        train(config["job"], report)
    except Stopped:
        (config["job"].work / STOPPED_FILE).touch()


def _train_in_process(job: Job, report: Report) -> None:
    """Train in this process, by Ray Train's local mode (num_workers=0).

    This saves the start of a controller, three helper actors and a worker (20 s of a 30 s trial on two cores), and the
    process keeps torch loaded for the next trial.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from tunery.training.worker_setup import reset_global_state

    reset_global_state()
    # ZeRO-3 shards nothing with one worker, and DeepSpeed (0.19.8) never frees a model that it has sharded.
    compute = job.compute.model_copy(update={"zero_stage": min(job.compute.zero_stage, 2)})
    # Not TorchTrainer, which destroys the process group at the end of a local run; the next trial needs it.
    trainer = DataParallelTrainer(
        lambda: train(dataclasses.replace(job, workers=1, compute=compute), report),
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(name=job.work.name, storage_path=str(job.work / "ray-train")),
    )
    try:
        trainer.fit()
    finally:
        reset_global_state()
