"""Event log of a run: append-only JSON lines, from which the terminal view, W&B and the report are generated.

Layout: `<run>/events/<writer>.jsonl`. Each file has one writer (the driver, rank 0 of a stage, the driver of a trial),
since concurrent appends are not safe on NFS. A reader merges the files by time and skips partial lines of killed
writers.

Every event has `t` (seconds since the epoch) and `event`; events of a stage also have `stage` (its name in the file)
and `trial` ("" outside a search). The kinds of event and their other keys:

    run_started      run, file, text (the experiment as written), stages ([{name, kind, inputs: [..]}]), versions,
                     command
    ray_connecting   address, limit (seconds): before connecting to a cluster; not written for a local Ray
    ray_started      seconds
    stage_started    kind, fingerprint, detail (one line)
    progress         done, total, unit ("rows" | "steps" | "objects" ..)          frequent; the last one counts;
                     detail (one line: what it does or waits for);
                     preparing: true before the work of the stage itself (tokenising rows)
    metrics          step, values {name: number}                                  a point of the training curves
    preview          template (a sentence about the chat template), records [{id, source, line, reason,
                     sequences}]: the first rows of a training as token sequences (models/preview.py)
    stage_finished   kind, fingerprint, reused (bool), seconds, artifact (path), facts {..} (see each stage kind)
    stage_failed     kind, message, cause, remedy, log
    search_started   fingerprint, metric, mode, metrics [..] (first metric, further objectives, constraints), objectives
                     [{metric, mode, weight}], constraints [{metric, max, min}], trials, scheduler, space {path: text},
                     max_concurrent, reason
    trial_started    trial, overrides {path: value}, origin ("initial" | "sampled" | "added" | "cloned" | "pbt_child" |
                     "replicate"), of (the trial that it is a clone, a copy or a replicate of)
    trial_finished   trial, overrides, state ("done" | "stopped" | "failed"), value (the metric or the weighted sum;
                     null if missing), values {metric: number}, feasible (satisfies the constraints), steps, tokens,
                     rows, seconds, error; origin and of if the search was cached
    search_finished  best (trial), best_overrides, value, seconds, ended_by (why it ended early), standings [{trial,
                     mean, ci_half_width (95%, or null), values}] of replicated trials, ties
                     [trials that do not differ significantly from the best], pareto_front [trials of the Pareto front],
                     best_fingerprints {stage: fingerprint}
    comparison       title, columns [..], rows [[..]], notes [..]: a summary table at the end of the run; optional
                     [..]: columns that a narrow terminal drops, last one first
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
"""Interval of fsync: a power failure loses at most this much of the log, a killed process nothing."""


class EventLog:
    """Appends events to one file without buffering: a kill loses at most the line being written, and lines after a full
    disk are readable."""

    def __init__(self, path: Path, *, stage: str = "", trial: str = "") -> None:
        self.path = path
        self._fixed = {key: value for key, value in (("stage", stage), ("trial", trial)) if value}
        self._synced = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        # A killed writer may have left a partial line: end it, so that the next event starts on its own line.
        self._broken = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")

    def write(self, event: str, **values: Any) -> None:
        """Append an event. Raises OSError if the line could not be written completely; the next line ends the partial
        one."""
        line = json.dumps({"t": time.time(), "event": event, **self._fixed, **values}, allow_nan=True) + "\n"
        data = b"\n" * self._broken + line.encode()
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            self._broken = True  # until everything is written: a nearly full disk may accept only a part
            while data:
                data = data[os.write(descriptor, data) :]
            self._broken = False
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(descriptor)
                self._synced = time.monotonic()
        finally:
            os.close(descriptor)


class EventReader:
    """Follows all files of an `events/` folder. `new()` returns the events since the last call, sorted by time."""

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
    """Return all events of a run so far, sorted by time."""
    return EventReader(folder).new()


def _parse(data: bytes) -> Iterator[Event]:
    for line in data.splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # a partial line of a killed writer (see EventLog)
            continue
        if isinstance(event, dict) and "t" in event and "event" in event:
            yield event
