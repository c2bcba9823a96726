"""Run an experiment with a live terminal view, W&B and a report, all generated from the event log."""

from __future__ import annotations

import sys
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
    """Results of a run and where its report, logs and W&B runs are."""

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
    """Run `experiment` and show its progress. The report and W&B files are also written if it fails or is interrupted.

    A failure while the run is closed is reported in addition to the error of the run, never instead of it.
    """
    folder = store.run(experiment.name)
    with (
        STOP.handled(),
        # Signals interrupt the experiment (run_experiment releases them), but neither the start nor the end of the run.
        STOP.held(),
        report_abrupt_exit(_killed_message(folder)),
        _single_run_lock(store, folder),
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
        # Stop Ray first: workers may still write to a stage whose lease has been released.
        _, ray_failed = _attempt(session.stop)
        report, report_failed = _attempt(lambda: write_report(folder))
        mirrored, mirror_failed = _attempt(lambda: mirror.close(lambda: STOP.hurried))
        synced = mirrored or WandbResult("disabled")
        lines = [
            f"report: {report}" if report else f"report: not written ({report_failed})",
            *synced.notes,
            *(
                f"{component}: {failed}"
                for component, failed in (("shutdown of Ray", ray_failed), ("W&B", mirror_failed))
                if failed
            ),
            f"logs:   {folder / 'logs'}",
        ]
        with suppress(OSError):  # standard output is a closed pipe, or a file on a full disk
            console.print()
            for line in lines:
                console.print(line, soft_wrap=True)
    if error is not None:
        raise error
    if STOP.requested:
        raise Interrupted(
            "interrupted while the run was closing; all stages are done, and the same command shows the results"
        )
    if report is None:
        raise TuneryError(
            "the run is done, but its report could not be written",
            cause=report_failed,
            remedy=f"write it with `tunery report {folder}`",
        )
    artifacts = artifacts or {}
    return RunSummary(experiment.name, folder, report, list(synced.notes), results(experiment, artifacts), artifacts)


def _attempt(step: Callable[[], T]) -> tuple[T | None, str]:
    """Run one step of closing a run. Returns its result and the reason of its failure ("" if it succeeded); the log has
    the traceback."""
    try:
        return step(), ""
    except Exception as error:
        with suppress(OSError):
            traceback.print_exc()  # standard error is redirected to the log of the run
        reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
        return None, reason.splitlines()[0]


def _killed_message(folder: Path) -> str:
    return f"""
error: the run's process was killed
cause: kill -9, the out-of-memory killer, or the end of Ray's node process (raylet), which also ends the driver
remedy: check the memory of the machine (dmesg), then run the same command again: it resumes the run
log: {folder / "logs" / "driver.log"}
"""


def _report_wait() -> Callable[[str], None]:
    """Return the function that is called every second while a run waits for `tunery store gc`. It prints one line, if
    the wait is not just that for another run that starts."""
    seconds = 0

    def wait(holder: str) -> None:
        nonlocal seconds
        seconds += 1
        if seconds == 2:
            print(f"waiting for `tunery store gc`: {holder}", file=sys.stderr, flush=True)

    return wait


@contextmanager
def _single_run_lock(store: Store, folder: Path) -> Iterator[None]:
    """Refuse a second concurrent run of the same name, which would write to the same event log. If `tunery store gc` is
    removing artifacts, wait for its end: it removes none while a run has its lease."""
    store.create()
    try:
        with Lease(folder / "lease"):
            with STOP.released(), store.gc_lease(_report_wait()):
                pass
            yield
    except LeaseHeld as held:
        raise RequestError(
            f"a run with this name is already active: {held.holder}",
            remedy="wait for it, or change the experiment's name (stages that both have are built only once)",
        ) from None
