"""What a stage's function gets, and what it gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunery.spec import Compute, Stage
from tunery.store.artifacts import Artifact


@dataclass(frozen=True)
class StageContext:
    """A stage reads `inputs`, writes into `out`, and may keep checkpoints in `work` for a later try."""

    name: str
    trial: str
    spec: Stage
    inputs: Mapping[str, Artifact]
    """By stage name."""
    seed: int
    folder: Path
    """Of the experiment's file: relative paths in it start there."""
    out: Path
    work: Path
    store: Path
    """The store's root."""
    scores: Path
    """The store's score tables (store/score_cache.py)."""
    events: Path
    """The run's folder of event logs, for workers that write their own."""
    logs: Path
    compute: Compute
    """With no `auto` left in it (see runner.resolve_compute)."""
    emit: Callable[..., None]
    """emit("progress", done=.., total=.., unit=..): into the run's event log, in the name of this stage."""
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What the stage's fingerprint was worked out from (see runner.identity)."""
    command: Callable[..., str] = lambda *words: " ".join(("tunery", *words))
    """command("review", "checked"): the command line that does that with this experiment and store."""
    in_process: bool = False
    """Train in this process (a trial has one for itself) instead of on Ray Train workers."""
    desk: Any = None
    """Of a search whose trials can be packed (training/packed/pack_server.py): the training takes a seat in a pack."""
    report: Callable[[dict[str, float]], None] = lambda metrics: None
    """Called by a training in this process or in a pack after each evaluation."""
    stop: Path | None = None
    """A file that somebody writes to end a training before its time: it raises Stopped."""
    kept: Path | None = None
    begins_with: Path | None = None
    """Both as a training's job has them (training/job.py)."""
    callbacks: tuple[Any, ...] = ()
    """Ray Train callbacks for a training on workers (a search's link from worker to Tune)."""


@dataclass(frozen=True)
class StageResult:
    """`facts` are the same for everybody who makes this artifact, `measured` (times, speeds) are not."""

    facts: dict[str, Any]
    measured: dict[str, Any] = field(default_factory=dict)
