"""The event log of a run: append-only JSON lines, the one source of the terminal's table, W&B and the report.

Layout: `<run>/events/<writer>.jsonl`. One file has one writer (the driver, a stage's rank 0, a trial's driver), so
that no two processes append to the same file, on NFS as on a laptop; a reader merges them by time. A line that a
killed writer left half-written is skipped.

Every event has `t` (seconds since the epoch), `event`, and, where it belongs to a stage, `stage` (its name in the
file) and `trial` ("" outside a search). The kinds of event and their further keys:

    run_started      run, file, text (the experiment as written), stages ([{name, kind, inputs: [..]}]), versions,
                     command
    ray_connecting   address, limit (seconds): a cluster is asked for; a Ray of this machine is not announced
    ray_started      seconds
    stage_started    kind, fingerprint, detail (one line)
    progress         done, total, unit ("rows" | "steps" | "objects" ..)          many; only the last one matters;
                     preparing: true before the stage's own work (rows are tokenised)
    metrics          step, values {name: number}                                  a point of a training's curves
    preview          template (what the chat template does, a sentence), records [{id, source, line, reason,
                     sequences}]: a training's first rows as its model gets them (models/preview.py)
    stage_finished   kind, fingerprint, reused (bool), seconds, artifact (path), facts {..} (see each stage kind)
    stage_failed     kind, message, cause, remedy, log
    search_started   metric, mode, metrics [..] (the first one, further ones, those of constraints), also
                     [{metric, mode, weight}], constraints [{metric, max, min}], trials, scheduler, space {path: text},
                     max_concurrent, reason
    trial_started    trial, overrides {path: value}, origin ("first" | "drawn" | "added" | "cloned" | "descendant" |
                     "replicate"), of (the trial that it is cloned or descended from, or repeats)
    trial_finished   trial, overrides, state ("done" | "stopped" | "failed"), value (the metric, or the weighted sum;
                     null without), values {metric: number}, feasible (keeps to the constraints), steps, tokens, rows,
                     seconds, error; origin and of where a search is told again that was done before
    search_finished  best (trial), best_overrides, value, seconds, ended_by (what ended it early), standings [{trial,
                     mean, half (of the 95% interval, or null), values}] of trials that were repeated, ties [trials
                     that seeds can't tell from the best], front [trials of the Pareto front], best_fingerprints
                     {stage: fingerprint}
    comparison       title, columns [..], rows [[..]], notes [..]: a table that the run ends with; optional [..]:
                     columns that a narrow terminal may leave out, the last one first
    overhead         first_step_seconds, ray_start_seconds, between_stages_seconds (list), stage_launch_seconds {..}
    run_finished     state ("done" | "failed" | "interrupted"), seconds, message
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Event = dict[str, Any]


SYNC_SECONDS = 5.0
"""How often a log is forced to disk: a machine that loses its power loses this much of it, a killed process nothing."""


class EventLog:
    """Appends events to one file. Each line is handed to the system at once: a kill loses at most the line being
    written, and a full disk not the lines after it."""

    def __init__(self, path: Path, *, stage: str = "", trial: str = "") -> None:
        self.path = path
        self._fixed = {key: value for key, value in (("stage", stage), ("trial", trial)) if value}
        self._synced = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        # A writer that was killed may have left half a line: close it, so that the next event starts on its own line.
        self._broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")

    def write(self, event: str, **values: Any) -> None:
        """Raises OSError when the line could not be written whole; what is there of it is closed by the next line."""
        line = json.dumps({"t": time.time(), "event": event, **self._fixed, **values}, allow_nan=True) + "\n"
        data = b"\n" * self._broken + line.encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            self._broken = True  # until all of it is written, of which a nearly full disk takes a part
            while data:
                data = data[os.write(descriptor, data) :]
            self._broken = False
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(descriptor)
                self._synced = time.monotonic()
        finally:
            os.close(descriptor)


class EventReader:
    """Follows all files of an `events/` folder; `new()` gives what was appended since the last call, by time."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._offsets: dict[Path, int] = {}

    def new(self) -> list[Event]:
        events: list[Event] = []
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb") as file:
                file.seek(self._offsets.get(path, 0))
                data = file.read()
            complete = data.rfind(b"\n") + 1
            self._offsets[path] = self._offsets.get(path, 0) + complete
            events.extend(_parse(data[:complete]))
        events.sort(key=lambda event: event["t"])
        return events


def read_events(folder: Path) -> list[Event]:
    """All events of a run so far, by time."""
    return EventReader(folder).new()


def _parse(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # half a line of a killed writer, closed by its successor (see EventLog)
            continue
        if isinstance(event, dict) and "t" in event and "event" in event:
            yield event
