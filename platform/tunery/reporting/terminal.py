"""Terminal output of an active run, which follows its event log.

On a terminal it is a live table. Elsewhere (a pipe, a file, a CI job, a dumb terminal) it is plain lines: one when a
stage starts, ends or fails and when a trial ends, and a stage's progress at most every 30 seconds. terminal_view.py
renders the table.
"""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from rich.console import Console
from rich.live import Live

from tunery.events.event_log import Event, EventReader
from tunery.events.event_reducer import apply
from tunery.events.formatting import duration, measure, overrides_text, short_paths, speed
from tunery.events.leaderboard import origin
from tunery.events.run_state import RunState, StageState
from tunery.events.stage_summary import latest, note
from tunery.reporting.terminal_view import final_table, render

__all__ = ["Terminal", "final_table", "render"]

INTERVAL_SECONDS = 0.25
PROGRESS_SECONDS = 30.0
"""Minimum time between two progress lines of plain output, so that the log of a day's training stays readable."""


class Terminal:
    """Follows a run's event log in a thread during the `with` block, and prints the final state at its end."""

    def __init__(self, console: Console, run: str, folder: Path, reader: EventReader) -> None:
        """`folder`: the run's folder; `reader` reads its `events/`; `run`: its name until the log has one."""
        self.console = console
        self.folder = folder
        self.state = RunState(run=run)
        self._reader = reader
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="tunery-terminal", daemon=True)
        self._live: Live | None = None
        self._has_failed = False
        self._lines = PlainLines(since=time.time())

    def __enter__(self) -> Terminal:
        if self.console.is_terminal and not self.console.is_dumb_terminal:
            # auto_refresh would render from a second thread; the follower renders after each read of the log.
            # Output of libraries to sys.stdout and sys.stderr goes to the run's log, not above the table.
            self._live = Live(console=self.console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
            self._live.start()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            if self._has_failed:
                if self._live:
                    self._live.stop()
                return
            self._read()
            if self._live:
                self._live.update(render(self.state, self.console.width, time.time()), refresh=True)
                self._live.stop()
            self._print_result()
        except Exception as failure:  # as in `_follow`; it must not replace the run's own error
            self._print_failure(failure)

    def _print_result(self) -> None:
        if not self.state.comparisons:
            return
        table = final_table(self.state, self.console.width)
        if self._live:
            self.console.print(table)
            return
        with self.console.capture() as output:
            self.console.print(table)
        for line in output.get().splitlines():
            self._print_line(line.rstrip())

    def _follow(self) -> None:
        try:
            while not self._stop.wait(INTERVAL_SECONDS):
                self._read()
                if self._live:
                    height = self.console.height
                    table = render(self.state, self.console.width, time.time(), height)
                    self._live.update(table, refresh=True)
        except Exception as error:  # a display error must not end days of training
            self._has_failed = True
            self._print_failure(error)

    def _print_failure(self, error: Exception) -> None:
        with suppress(OSError):  # the terminal is closed, the pipe is closed, or the disk is full
            self.console.print(
                f"the live view stopped ({type(error).__name__}: {error}); the run continues", markup=False
            )

    def _read(self) -> None:
        for event in self._reader.new():
            apply(self.state, event)
            if self._live is None:
                for line in self._lines.lines(self.state, event):
                    self._print_line(line)

    def _print_line(self, line: str) -> None:
        # A log file in the C locale cannot encode every character: "?" replaces those.
        encoding = self.console.encoding or "utf-8"
        self.console.out(line.encode(encoding, "replace").decode(encoding), highlight=False)


class PlainLines:
    """Formats events as plain lines. Skips events before `since`, and limits the rate of progress lines."""

    def __init__(self, since: float) -> None:
        self._since = since
        self._last_progress = since

    def lines(self, state: RunState, event: Event) -> list[str]:
        """Lines of an event that `state` already contains; none for events of earlier invocations of the run."""
        if event["t"] < self._since:
            return []
        lines = self._event_lines(state, event)
        elapsed = duration(max(0.0, event["t"] - (state.started or event["t"])))
        return [f"{elapsed:>8}  {line}" if index == 0 else f"{'':>8}  {line}" for index, line in enumerate(lines)]

    def _event_lines(self, state: RunState, event: Event) -> list[str]:
        name, trial = str(event.get("stage") or ""), str(event.get("trial") or "")
        match event["event"]:
            case "ray_connecting":
                return [f"connecting to Ray at {state.connecting}"]
            case "stage_started" if not trial:
                stage = state.stages[name]
                return [
                    f"{name}: started"
                    + (f" ({stage.kind})" if stage.kind else "")
                    + (f": {stage.detail}" if stage.detail else "")
                ]
            case "stage_finished" if not trial:
                stage = state.stages[name]
                took = f" in {duration(stage.seconds)}" if stage.seconds is not None and stage.status == "done" else ""
                summary = note(stage)
                return [
                    f"{name}: {summary}"
                    if stage.status == "reused"
                    else f"{name}: done{took}" + (f": {summary}" if summary else "")
                ]
            case "stage_failed" if not trial:
                return _failure_lines(state.stages[name])
            case "progress" if not trial and event["t"] - self._last_progress >= PROGRESS_SECONDS:
                self._last_progress = event["t"]
                return [_progress_line(state.stages[name], event["t"])]
            case "trial_finished":
                return [_trial_line(state, trial)]
            case _:
                return []


def _failure_lines(stage: StageState) -> list[str]:
    error = stage.error
    if error is None:
        return []
    details = [
        f"{label}: {text}"
        for label, text in (("cause", error.cause), ("remedy", error.remedy), ("log", error.log))
        if text
    ]
    return [f"{stage.name}: failed: {error.message}", *(f"  {line}" for line in details)]


def _progress_line(stage: StageState, now: float) -> str:
    amount = f"{stage.done:,.0f}" + (f"/{stage.total:,.0f}" if stage.total else "") + f" {stage.unit}"
    left = stage.time_left(now)
    parts = [
        amount if stage.done or not stage.detail else "",
        speed(stage.rate, stage.unit) if stage.rate else "",
        f"{duration(left)} left" if left is not None else "",
        latest(stage),
        stage.detail,
    ]
    return f"{stage.name}: " + ", ".join(part for part in parts if part)


def _trial_line(state: RunState, name: str) -> str:
    search = state.search
    if search is None or name not in search.trials:
        return f"trial {name}: finished"
    trial = search.trials[name]
    ended = search.count("done", "stopped", "failed")
    value = f" {search.metric} {measure(trial.value)}" if trial.value is not None else ""
    best = " (best so far)" if search.best is trial else f" ({origin(trial)})" if origin(trial) else ""
    overrides = overrides_text(trial.overrides, short_paths(search.space or trial.overrides))
    why = f": {trial.error.splitlines()[0]}" if trial.error else ""
    return f"trial {name}: {trial.status}{value}{best}  {overrides}  [{ended} of {search.total}]{why}"
