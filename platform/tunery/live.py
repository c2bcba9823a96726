"""A run with its live view: terminal, W&B and report, all drawn from the event log."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from tunery.errors import Interrupted, RequestError, TuneryError
from tunery.events.event_log import EventLog, EventReader
from tunery.interrupt import STOP, report_abrupt_exit
from tunery.pipeline.ray_session import RaySession, redirect_output
from tunery.reporting.report import write_report
from tunery.reporting.summary_tables import results
from tunery.reporting.terminal import Terminal
from tunery.reporting.wandb_mirror import WandbMirror, WandbResult
from tunery.run import run_experiment
from tunery.spec import Experiment
from tunery.spec.yaml_source import YamlSource
from tunery.store import Artifact, Lease, LeaseHeld, Store

T = TypeVar("T")


@dataclass(frozen=True)
class RunSummary:
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


def run_live(experiment: Experiment, source: YamlSource, store: Store, *, quiet: bool = False) -> RunSummary:
    """Run `experiment`, showing it; the report and W&B files are written also when it fails or is interrupted.

    Whatever fails while the run is closed is reported beside its error and never instead of it.
    """
    folder = store.run(experiment.name)
    with (
        STOP.handled(),
        # Signals interrupt the experiment (run_experiment releases them), and neither its start nor its end.
        STOP.held(),
        report_abrupt_exit(_killed(folder)),
        _single_run_lock(folder),
        redirect_output(folder / "logs" / "driver.log") as out,
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
        with Terminal(console, experiment.name, folder, EventReader(folder / "events")):
            try:
                artifacts = run_experiment(experiment, source, store, session).artifacts
            except TuneryError as failed:
                error = failed
        # First: workers may still write into a stage whose lease is given back.
        _, ray_failed = _attempt(session.stop)
        report, report_failed = _attempt(lambda: write_report(folder))
        mirrored, mirror_failed = _attempt(lambda: mirror.close(lambda: STOP.hurried))
        synced = mirrored or WandbResult("disabled")
        lines = [
            f"report: {report}" if report else f"report: not written ({report_failed})",
            *synced.notes,
            *(f"{what}: {failed}" for what, failed in (("Ray's end", ray_failed), ("W&B", mirror_failed)) if failed),
            f"logs:   {folder / 'logs'}",
        ]
        with suppress(OSError):  # standard output is a closed pipe, or a file on a full disk
            console.print()
            for line in lines:
                console.print(line, soft_wrap=True)
    if error is not None:
        raise error
    if STOP.requested:
        raise Interrupted("stopped while the run was closed; every stage is done, and the same command shows them")
    if report is None:
        raise TuneryError(
            "the run is done, but its report could not be written",
            cause=report_failed,
            remedy=f"then write it with `tunery report {folder}`",
        )
    made = artifacts or {}
    return RunSummary(experiment.name, folder, report, list(synced.notes), results(experiment, made), made)


def _attempt(step: Callable[[], T]) -> tuple[T | None, str]:
    """What `step` of a run's end returned, and why it failed ("" where it did not); the log has the traceback."""
    try:
        return step(), ""
    except Exception as error:
        with suppress(OSError):
            traceback.print_exc()  # standard error is the run's log here
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        return None, reason.splitlines()[0]


def _killed(folder: Path) -> str:
    return f"""
error: the run's process was killed
cause: by somebody or the system (kill -9, out of memory), or Ray's node process (raylet) was, and took it along
remedy: look at the memory of the machine (dmesg), then give the same command again: it goes on from where it was
log: {folder / "logs" / "driver.log"}
"""


@contextmanager
def _single_run_lock(folder: Path) -> Iterator[None]:
    """Two runs of one name would write one event log: the second is refused while the first lives."""
    try:
        with Lease(folder / "lease"):
            yield
    except LeaseHeld as held:
        raise RequestError(
            f"a run of this name is going on already: {held.holder}",
            remedy="wait for it, or give the experiment another name (what both need is still made once)",
        ) from None
