"""Input and output of the function that implements a stage kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tunery.spec import Compute, Stage
from tunery.store.artifacts import Artifact


class Launcher(Protocol):
    """Where the training or the model tasks of a stage run: on the workers of the run, in the process of a trial, or in
    a pack (training/launch.py). For trials it also has the connection to the search."""

    @property
    def is_parallel(self) -> bool:
        """Whether there are several processes."""

    @property
    def stop_file(self) -> Path | None:
        """As in training/job.py."""

    @property
    def checkpoint_dir(self) -> Path | None:
        """As in training/job.py."""

    @property
    def resume_from(self) -> Path | None:
        """As in training/job.py."""

    def with_waiting(self, waiting: Callable[[str], None]) -> Launcher:
        """Return a copy that calls `waiting` with a message while workers have not started."""

    def release(self) -> None:
        """Free CPUs and GPUs that are reserved for the next stages. Called while another run builds the artifact."""

    def train(self, job: Any) -> None:
        """Run a training (training/job.py, `Job`) and wait for its end."""

    def map_tasks(
        self,
        callable_class: type,
        constructor_args: tuple[Any, ...],
        tasks: list[dict[str, Any]],
        on_cpu: bool = False,
        max_crashes: int = ...,
    ) -> Iterator[dict[str, Any]]:
        """Construct `callable_class(*constructor_args)` once per process, call it with a batch {column: [value]} per
        task, and yield the results in order of completion. It is a callable class as for `map_batches` of Ray Data.

        on_cpu: for work without a model, which may use all free CPUs of the cluster. max_crashes: how often a task is
        repeated whose worker died. Raises the error of the first task that failed.
        """


@dataclass(frozen=True)
class StageContext:
    """A stage reads `inputs`, writes to `out`, and may save checkpoints in `staging_dir` for later attempts."""

    name: str
    trial: str
    spec: Stage
    inputs: Mapping[str, Artifact]
    """By stage name."""
    seed: int
    folder: Path
    """Directory that relative paths in the experiment file refer to."""
    out: Path
    staging_dir: Path
    """Contains `out`, and what later attempts can use (Store.staging_dir)."""
    store: Path
    """Root of the store."""
    scores: Path
    """Score caches of the store (store/score_cache.py)."""
    events: Path
    """Folder of event logs of the run, for workers that write their own log."""
    logs: Path
    compute: Compute
    """Without `auto` (pipeline/compute.py, `resolve_compute`)."""
    launcher: Launcher
    emit: Callable[..., None]
    """emit("progress", done=.., total=.., unit=..) writes an event of this stage to the event log of the run."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """The fields that the fingerprint of the stage is computed from (pipeline/cache_keys.py, `identity`)."""
    command: Callable[..., str] = lambda *words: " ".join(("tunery", *words))
    """command("review", "checked") returns the `tunery` command line for this experiment and store."""


@dataclass(frozen=True)
class StageResult:
    """`facts` are deterministic; `runtime_stats` has times and speeds."""

    facts: dict[str, Any]
    runtime_stats: dict[str, Any] = field(default_factory=dict)
