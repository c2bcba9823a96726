"""A run with its live view: terminal, W&B and report, all drawn from the event log."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from tunery.comparison import results
from tunery.errors import RequestError, TuneryError
from tunery.interrupt import last_words
from tunery.run import run_experiment
from tunery.runner.session import RaySession, noise_to
from tunery.spec import Experiment
from tunery.spec.yaml_source import YamlSource
from tunery.store import Artifact, Lease, LeaseHeld, Store
from tunery.track.events import EventLog, EventReader
from tunery.track.report import write_report
from tunery.track.terminal import Terminal
from tunery.track.wandb_mirror import WandbMirror


@dataclass(frozen=True)
class Told:
    """Where to look when a run has ended."""

    run: str
    folder: Path
    report: Path
    wandb: list[str]
    results: dict[str, Any]
    artifacts: dict[str, Artifact] = field(default_factory=dict)
    """By stage."""

    def as_json(self) -> dict[str, Any]:
        return {
            "run": self.run,
            "folder": str(self.folder),
            "report": str(self.report),
            "wandb": self.wandb,
            "results": self.results,
        }


def run_live(experiment: Experiment, source: YamlSource, store: Store, *, quiet: bool = False) -> Told:
    """Run `experiment`, showing it; the report and W&B files are written also when it fails or is interrupted."""
    folder = store.run(experiment.name)
    with (
        last_words(_killed(folder)),
        _alone(folder),
        noise_to(folder / "logs" / "driver.log") as out,
        _sigterm_interrupts(),
    ):
        log = EventLog(folder / "events" / "driver.jsonl")
        session = RaySession(log, folder / "logs")
        mirror = WandbMirror(
            experiment.tracking.wandb, experiment.name, folder, experiment.model_dump(mode="json", exclude_none=True)
        )
        console = Console(file=out, quiet=quiet, highlight=False)
        mirror.start()
        error: TuneryError | None = None
        artifacts = None
        try:
            with Terminal(console, experiment.name, folder, EventReader(folder / "events")):
                try:
                    artifacts = run_experiment(experiment, source, store, session).artifacts
                except TuneryError as failed:
                    error = failed
        finally:
            session.stop()  # first: workers may still write into a stage whose lease is given back
            try:
                report = write_report(folder)
            finally:
                synced = mirror.close()
        console.print()
        for line in (f"report: {report}", *synced.notes, f"logs:   {folder / 'logs'}"):
            console.print(line, soft_wrap=True)
    if error is not None:
        raise error
    made = artifacts or {}
    return Told(experiment.name, folder, report, list(synced.notes), results(experiment, made), made)


def _killed(folder: Path) -> str:
    return f"""
error: the run's process was killed
cause: by somebody or the system (kill -9, out of memory), or Ray's node process (raylet) was, and took it along
remedy: look at the memory of the machine (dmesg), then give the same command again: it goes on from where it was
log: {folder / "logs" / "driver.log"}
"""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two runs of one name would write one event log: the second is refused while the first lives."""
    try:
        with Lease(folder / "lease"):
            yield
    except LeaseHeld as held:
        raise RequestError(
            f"a run of this name is going on already: {held.holder}",
            remedy="wait for it, or give the experiment another name (what both need is still made once)",
        ) from None


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM (kill, a cluster's scheduler) ends a run as Ctrl-C does: cleanly, and resumable."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
