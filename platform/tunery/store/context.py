"""Input and output of the function that implements a stage kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunery.spec import Compute, Stage
from tunery.store.artifacts import Artifact


@dataclass(frozen=True)
class StageContext:
    """A stage reads `inputs`, writes to `out`, and may save checkpoints in `work` for later attempts."""

    name: str
    trial: str
    spec: Stage
    inputs: Mapping[str, Artifact]
    """By stage name."""
    seed: int
    folder: Path
    """Directory that relative paths in the experiment file refer to."""
    out: Path
    work: Path
    """Staging directory (Store.staging_dir)."""
    store: Path
    """Root of the store."""
    scores: Path
    """Score caches of the store (store/score_cache.py)."""
    events: Path
    """Folder of event logs of the run, for workers that write their own log."""
    logs: Path
    compute: Compute
    """Without `auto` (pipeline/compute.py, `resolve_compute`)."""
    emit: Callable[..., None]
    """emit("progress", done=.., total=.., unit=..) writes an event of this stage to the event log of the run."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """The fields that the fingerprint of the stage is computed from (pipeline/cache_keys.py, `identity`)."""
    command: Callable[..., str] = lambda *words: " ".join(("tunery", *words))
    """command("review", "checked") returns the `tunery` command line for this experiment and store."""
    in_process: bool = False
    """Train in this process (the driver of a trial) instead of on Ray Train workers."""
    desk: Any = None
    """Handle of the pack scheduler if the training runs in a pack (training/packed/pack_server.py)."""
    report: Callable[[dict[str, float]], None] = lambda metrics: None
    """Called after each evaluation of a training in this process or in a pack."""
    stop: Path | None = None
    """A training raises Stopped when this file exists."""
    kept: Path | None = None
    begins_with: Path | None = None
    """Both as in training/job.py."""
    callbacks: tuple[Any, ...] = ()
    """Ray Train callbacks of a training on workers, such as reports to Tune."""


@dataclass(frozen=True)
class StageResult:
    """`facts` are deterministic; `measured` has times and speeds."""

    facts: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)
