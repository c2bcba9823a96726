"""The function of all training stages, and the launchers, which run a training on the workers of the run, in this
process, or in a pack. Launchers also run the tasks of scoring and evaluation."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from tunery.models.load import source_of
from tunery.models.reward_functions import reward_origin
from tunery.spec import TRAINERS, Compute, PositiveNegative, ReviewLabels, Scratch, Training
from tunery.spec.plugins import load_object
from tunery.spec.trainings import data_refs
from tunery.store import Artifact, StageContext, StageResult
from tunery.store.rows import REVIEWED_DIR
from tunery.training.auto import resolve_auto
from tunery.training.checkpoints import seed_from
from tunery.training.job import Job, Report, RowSource
from tunery.training.packed.pack_server import train_packed
from tunery.workers.cluster_resources import free_resources, num_workers
from tunery.workers.map_tasks import Task, map_in_process, map_on_cpus
from tunery.workers.worker_group import CurrentWorkerGroup, Waiting

Data = str | PositiveNegative | ReviewLabels | dict[str, float]
DEFAULT_MAX_CRASHES = 3
"""How many worker deaths a task tolerates; the next one fails it."""


def run_training(context: StageContext) -> StageResult:
    """Train a model. Facts: row, step and token counts, losses, and resolved `auto` values. Runtime stats: speeds,
    memory, seconds to the first step."""
    spec, launcher = context.spec, context.launcher
    assert isinstance(spec, Training)
    resolved_spec, resolved_fields = resolve_auto(spec, _row_count(spec.data, context.inputs))
    artifacts = {name: artifact.path for name, artifact in context.inputs.items()}
    # Keys of some stage kinds only, those of plugins included.
    reward, ptx = getattr(spec, "reward", None), getattr(spec, "ptx", None)
    model: dict[str, Any]
    if isinstance(spec.model, Scratch):
        model = {"scratch": spec.model.scratch}
    else:
        model = source_of(spec.model, artifacts, context.folder)
    job = Job(
        stage=context.name,
        trial=context.trial,
        spec=resolved_spec,
        seed=context.seed,
        model=model,
        data=_row_sources(spec.data, context.inputs),
        eval_data=_row_sources(spec.eval_data, context.inputs) if spec.eval_data is not None else (),
        reward=None if reward is None else reward_origin(reward, artifacts, context.folder),
        ptx_data=_row_sources(ptx.data, context.inputs) if ptx is not None else (),
        out=context.out,
        staging_dir=context.staging_dir,
        store=context.store,
        events=context.events,
        compute=context.compute,
        started_at=time.time(),
        stop_file=launcher.stop_file,
        checkpoint_dir=launcher.checkpoint_dir,
        resume_from=launcher.resume_from,
    )
    if job.resume_from is not None:
        seed_from(job.resume_from, job.staging_dir / "checkpoints")
    launcher.train(job)
    outcome = json.loads((context.staging_dir / "outcome.json").read_text())
    shutil.rmtree(context.staging_dir / "checkpoints", ignore_errors=True)
    resolved = {item.field: {"value": item.value, "rule": item.rule} for item in resolved_fields}
    return StageResult({**outcome["facts"], "resolved": resolved}, outcome["runtime_stats"])


def _row_sources(data: Data, inputs: Mapping[str, Artifact]) -> tuple[RowSource, ...]:
    """Return one source per stage in `data` or `eval_data`."""
    if isinstance(data, dict):
        return tuple(RowSource(inputs[stage].path) for stage in data)
    if isinstance(data, PositiveNegative):
        return RowSource(inputs[data.good].path, True), RowSource(inputs[data.bad].path, False)
    if isinstance(data, ReviewLabels):
        return (RowSource(inputs[data.review].path / REVIEWED_DIR),)
    return (RowSource(inputs[data].path),)


def _row_count(data: Data, inputs: Mapping[str, Artifact]) -> int:
    """Return the number of rows of all stages in `data`, by their facts."""
    fact = "decided" if isinstance(data, ReviewLabels) else "rows"
    return sum(int(inputs[stage].facts[fact]) for stage in data_refs(data).values())


def train(job: Job, report: Report) -> None:
    """Run the training loop of the stage kind. Every worker calls it."""
    loop: Callable[[Job, Report], None] = load_object(TRAINERS[job.spec.kind].loop)
    loop(job, report)


@dataclass(frozen=True, kw_only=True)
class _Launcher:
    """The connection of a trial to its search, and of a stage to the event log. The defaults are those of a stage
    outside a search."""

    waiting: Waiting = lambda message: None
    report: Report = lambda metrics: None
    stop_file: Path | None = None
    checkpoint_dir: Path | None = None
    resume_from: Path | None = None

    def with_waiting(self, waiting: Waiting) -> Self:
        return dataclasses.replace(self, waiting=waiting)


@dataclass(frozen=True)
class WorkersLauncher(_Launcher):
    """Runs trainings and tasks on a group of Ray Train workers, which stays alive for the next stages."""

    workers: CurrentWorkerGroup
    compute: Compute
    is_parallel: ClassVar[bool] = True

    def release(self) -> None:
        self.workers.close()

    def train(self, job: Job) -> None:
        group = self.workers.group(self.compute)
        group.run(train, job, self.report, job.compute.max_failures, self.waiting)

    def map_tasks(
        self,
        callable_class: type,
        constructor_args: tuple[Any, ...],
        tasks: list[Task],
        on_cpu: bool = False,
        max_crashes: int = DEFAULT_MAX_CRASHES,
    ) -> Iterator[Task]:
        if on_cpu:
            return self._map_on_cpus(callable_class, constructor_args, tasks, max_crashes)
        group = self.workers.group(self.compute)
        return group.map(callable_class, constructor_args, tasks, max_crashes, self.waiting)

    def _map_on_cpus(
        self, callable_class: type, constructor_args: tuple[Any, ...], tasks: list[Task], max_crashes: int
    ) -> Iterator[Task]:
        free, reserved = num_workers(free_resources(), "cpu", 1), self.workers.reserved_cpus
        if reserved > free:  # reserved by the workers, which are idle while this stage runs
            return map_on_cpus(callable_class, constructor_args, tasks, reserved, max_crashes, num_cpus=0)
        return map_on_cpus(callable_class, constructor_args, tasks, max(1, free), max_crashes)


@dataclass(frozen=True)
class InProcessLauncher(_Launcher):
    """Runs trainings and tasks in this process: that of a trial, which Tune reuses for the next trial.

    Ray Train's local mode (num_workers=0) saves the start of a controller, three helper actors and a worker (20 s of a
    30 s trial on two cores).
    """

    is_parallel: ClassVar[bool] = False

    def release(self) -> None:
        """Do nothing: Ray Tune has reserved the CPU or GPU for the trial."""

    def train(self, job: Job) -> None:
        from ray.train import RunConfig, ScalingConfig
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

        from tunery.workers.process_state import reset_global_state

        reset_global_state()
        # With one worker there is nothing to shard.
        compute = job.compute.model_copy(update={"zero_stage": min(job.compute.zero_stage, 2)})
        # Not TorchTrainer, which destroys the process group at the end of a local run; the next trial needs it.
        trainer = DataParallelTrainer(
            lambda: train(dataclasses.replace(job, compute=compute), self.report),
            scaling_config=ScalingConfig(num_workers=0),
            run_config=RunConfig(name=job.staging_dir.name, storage_path=str(job.staging_dir / "ray-train")),
        )
        try:
            trainer.fit()
        finally:
            reset_global_state()

    def map_tasks(
        self,
        callable_class: type,
        constructor_args: tuple[Any, ...],
        tasks: list[Task],
        on_cpu: bool = False,
        max_crashes: int = DEFAULT_MAX_CRASHES,
    ) -> Iterator[Task]:
        # The trial holds its CPU or GPU already. Actors would need another one and might wait for it forever.
        return map_in_process(callable_class, constructor_args, tasks)


@dataclass(frozen=True)
class PackLauncher(InProcessLauncher):
    """Runs trainings in a pack with those of other trials (training/packed/pack_server.py)."""

    pack_scheduler: Any
    """Handle of the PackScheduler."""

    def train(self, job: Job) -> None:
        train_packed(job, self.pack_scheduler, self.report)
