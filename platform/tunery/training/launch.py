"""Run a training stage. The launchers below run its training on the workers of the run, in this process, or in a pack;
they also run the model tasks of scoring and evaluation."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from tunery.models.load import source_of
from tunery.models.reward_functions import reward_origin
from tunery.spec import TRAINERS, Compute, PositiveNegative, ReviewLabels, Scratch, Training
from tunery.spec.plugins import load_object
from tunery.spec.trainings import data_refs
from tunery.store import Artifact, StageContext, StageResult
from tunery.store.rows import REVIEWED_DIR
from tunery.training.auto import resolve
from tunery.training.checkpoints import seed_from
from tunery.training.job import Job, Report, RowSource
from tunery.training.packed.pack_server import train_packed
from tunery.workers.map_tasks import Task, map_in_process, map_on_cpus
from tunery.workers.worker_group import Workers

Data = str | PositiveNegative | ReviewLabels | dict[str, float]
MAX_CRASHES = 3
"""How many worker deaths during one task are tolerated, unless the stage sets its own limit; the next one fails it."""


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
    workers, launcher = context.compute.workers, context.launcher
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
        work=context.staging_dir,
        store=context.store,
        events=context.events,
        compute=context.compute,
        workers=workers,
        started=time.time(),
        stop=launcher.stop,
        checkpoint_dir=launcher.checkpoint_dir,
        resume_from=launcher.resume_from,
    )
    if job.resume_from is not None:
        seed_from(job.resume_from, job.work / "checkpoints")
    launcher.train(job)
    outcome = json.loads((context.staging_dir / "outcome.json").read_text())
    shutil.rmtree(context.staging_dir / "checkpoints", ignore_errors=True)
    resolved_values = {item.field: {"value": item.value, "rule": item.rule} for item in resolved}
    return StageResult({**outcome["facts"], "resolved": resolved_values}, outcome["runtime_stats"])


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
    """Train in each worker, by the loop of the stage kind."""
    loop: Callable[[Job, Report], None] = load_object(TRAINERS[job.spec.kind].loop)
    loop(job, report)


@dataclass(frozen=True, kw_only=True)
class _LauncherFields:
    """The connection of a trial to its search; without effect for the stages of a file."""

    report: Callable[[dict[str, float]], None] = lambda metrics: None
    stop: Path | None = None
    checkpoint_dir: Path | None = None
    resume_from: Path | None = None


@dataclass(frozen=True)
class OnWorkers(_LauncherFields):
    """On a group of Ray Train workers, which stays alive for the next stages."""

    workers: Workers
    compute: Compute
    is_parallel: ClassVar[bool] = True

    def release(self) -> None:
        self.workers.close()

    def train(self, job: Job) -> None:
        self.workers.group(self.compute).run(train, job, self.report, job.compute.max_failures)

    def map_tasks(
        self,
        actor: type,
        arguments: tuple[Any, ...],
        tasks: list[Task],
        on_cpu: bool = False,
        max_crashes: int = MAX_CRASHES,
    ) -> Iterator[Task]:
        if on_cpu:
            return self._map_on_cpus(actor, arguments, tasks)
        return self.workers.group(self.compute).map(actor, arguments, tasks, max_crashes)

    def _map_on_cpus(self, actor: type, arguments: tuple[Any, ...], tasks: list[Task]) -> Iterator[Task]:
        free, group = _free_cpus(), self.workers.running(self.compute)
        idle = group.num_workers * self.compute.cpus_per_worker if group is not None else 0
        if idle > free:  # the workers have reserved these CPUs, but wait for the stage
            return map_on_cpus(actor, arguments, tasks, idle, num_cpus=0)
        return map_on_cpus(actor, arguments, tasks, max(1, free))


@dataclass(frozen=True)
class InProcess(_LauncherFields):
    """In the process of a trial, which Tune reuses for the next trial.

    Ray Train's local mode (num_workers=0) saves the start of a controller, three helper actors and a worker (20 s of a
    30 s trial on two cores).
    """

    is_parallel: ClassVar[bool] = False

    def release(self) -> None:
        """Nothing: the CPU or GPU belongs to the trial."""

    def train(self, job: Job) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from tunery.workers.process_state import reset_global_state

        reset_global_state()
        # ZeRO-3 has nothing to shard with one worker.
        compute = job.compute.model_copy(update={"zero_stage": min(job.compute.zero_stage, 2)})
        # Not TorchTrainer, which destroys the process group at the end of a local run; the next trial needs it.
        trainer = DataParallelTrainer(
            lambda: train(dataclasses.replace(job, workers=1, compute=compute), self.report),
            scaling_config=ScalingConfig(num_workers=0),
            run_config=RunConfig(name=job.work.name, storage_path=str(job.work / "ray-train")),
        )
        try:
            trainer.fit()
        finally:
            reset_global_state()

    def map_tasks(
        self,
        actor: type,
        arguments: tuple[Any, ...],
        tasks: list[Task],
        on_cpu: bool = False,
        max_crashes: int = MAX_CRASHES,
    ) -> Iterator[Task]:
        # A trial holds its CPU or GPU already, and would wait forever for actors that need another one.
        return map_in_process(actor, arguments, tasks)


@dataclass(frozen=True)
class InPack(InProcess):
    """In a pack with other trials (training/packed/pack_server.py)."""

    pack_scheduler: Any

    def train(self, job: Job) -> None:
        train_packed(job, self.pack_scheduler, self.report)


def _free_cpus() -> int:
    """CPUs of the cluster that no other actor or trial holds."""
    import ray

    return int(ray.available_resources().get("CPU", 0))
