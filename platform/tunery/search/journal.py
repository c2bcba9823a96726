"""Journal of a search, one JSON object per line. After a kill, the same command resumes from it.

    {"event": "opened", "at": seconds since the epoch}                 an invocation of the command
    {"event": "begun", "trial", "number", "overrides", "origin", "of", "since"}
    {"event": "report", "trial", "result": {metric, tokens, steps, share}}  an intermediate evaluation
    {"event": "ended", "trial", "state", "values", "tokens", "seconds", "error"}
    {"event": "spent", "seconds"}                                       wall time of an invocation, updated regularly

The journal has the outcomes of finished trials. The stages and checkpoints of unfinished trials are in the store.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

PROGRESS = ("steps", "tokens", "rows")
"""Progress counters of a trial."""
Origin = Literal["initial", "sampled", "added", "cloned", "pbt_child", "replicate"]


@dataclass(frozen=True)
class TrialStart:
    """A trial that the search decided to run."""

    trial: str
    number: int
    """Number among the sampled trials; seeds the sampler."""
    overrides: dict[str, Any]
    origin: Origin
    of: str = ""
    """The trial that it is a clone, a copy (PBT) or a replicate of."""
    since: int = 0
    """Of a copy (PBT): the step of the checkpoint of `of` that it starts from."""


@dataclass
class JournalRecord:
    """What the journal has about a trial."""

    start: TrialStart
    reports: list[dict[str, float]] = field(default_factory=list)
    outcome: dict[str, Any] | None = None
    """State and final metrics; None until the trial ends."""


class Journal:
    """Reads the journal of earlier invocations and appends to it. Only one process may write."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: dict[str, JournalRecord] = {}
        self.elapsed = 0.0
        """Wall time of earlier invocations in seconds."""
        for line in _read_lines(path):
            self._apply(line)

    def begin(self, start: TrialStart) -> None:
        self._write({"event": "begun", **asdict(start)})

    def report(self, trial: str, result: dict[str, float]) -> None:
        self._write({"event": "report", "trial": trial, "result": result})

    def end(self, trial: str, **outcome: Any) -> None:
        self._write({"event": "ended", "trial": trial, **outcome})

    def mark_stopped(self, trial: str, metrics: Iterable[str]) -> None:
        """End a trial that was stopped early, with the metrics of its last report."""
        last = (self.records[trial].reports or [{}])[-1]
        values = {metric: last[metric] for metric in metrics if metric in last}
        progress = {name: last.get(name) for name in PROGRESS}
        self.end(trial, state="stopped", values=values, **progress, seconds=None, error="")

    def add_elapsed(self, seconds: float) -> None:
        """Record the wall time of this invocation so far."""
        self._append({"event": "spent", "seconds": seconds, "before": self.elapsed})

    @property
    def open_trials(self) -> list[TrialStart]:
        """Trials that have started and not ended, in order of their start."""
        return [record.start for record in self.records.values() if record.outcome is None]

    @property
    def ended_records(self) -> list[JournalRecord]:
        return [record for record in self.records.values() if record.outcome is not None]

    def _write(self, line: dict[str, Any]) -> None:
        self._append(line)
        self._apply(line)

    def _append(self, line: dict[str, Any]) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:  # not kept open: Tune pickles objects with a journal
                file.write(json.dumps(line) + "\n")
                if line["event"] != "report":  # a lost report is repeated by its trial
                    file.flush()
                    os.fsync(file.fileno())
        except OSError:
            with suppress(OSError):  # a full disk may leave a partial line, which the next line would be appended to
                os.truncate(self._path, size)
            raise

    def _apply(self, line: dict[str, Any]) -> None:
        fields = {name: value for name, value in line.items() if name != "event"}
        match line["event"]:
            case "begun":
                self.records[fields["trial"]] = JournalRecord(TrialStart(**fields))
            case "report":
                self.records[fields["trial"]].reports.append(fields["result"])
            case "ended":
                self.records[fields.pop("trial")].outcome = fields
            case "spent":
                self.elapsed = fields["before"] + fields["seconds"]


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines. A partial last line, left by a killed writer, is truncated."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    if complete := text[: text.rfind("\n") + 1]:
        yield from (json.loads(line) for line in complete.splitlines())
    if complete != text:
        os.truncate(path, len(complete.encode()))
