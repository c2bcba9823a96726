"""What a search has begun and what became of it, a JSON line each: with it the same command goes on after a kill.

    {"event": "opened", "at": seconds since the epoch}                 an invocation of the command
    {"event": "begun", "trial", "number", "overrides", "origin", "of", "since"}
    {"event": "report", "trial", "result": {metric, tokens, steps, share}}  an evaluation on the way
    {"event": "ended", "trial", "state", "values", "tokens", "seconds", "error"}
    {"event": "spent", "seconds"}                                       wall time of an invocation, again and again

The finished trials stand here; of the unfinished ones their stages and checkpoints are in the store.
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
"""How far a trial is."""
Origin = Literal["first", "drawn", "added", "cloned", "descendant", "replicate"]


@dataclass(frozen=True)
class TrialStart:
    """A trial that was decided on."""

    trial: str
    number: int
    """Of those drawn: what its chance hangs on."""
    overrides: dict[str, Any]
    origin: Origin
    of: str = ""
    """The trial that it is cloned or descended from, or repeats."""
    since: int = 0
    """Of a descendant: the step of that one's checkpoint that it begins with."""


@dataclass
class JournalRecord:
    """A trial, as far as the journal knows."""

    begun: TrialStart
    reports: list[dict[str, float]] = field(default_factory=list)
    ended: dict[str, Any] | None = None


class Journal:
    """One process writes it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.records: dict[str, JournalRecord] = {}
        self.spent = 0.0
        """Seconds of earlier invocations."""
        for line in _lines(path):
            self._fold(line)

    def begin(self, begun: TrialStart) -> None:
        self._write({"event": "begun", **asdict(begun)})

    def report(self, trial: str, result: dict[str, float]) -> None:
        self._write({"event": "report", "trial": trial, "result": result})

    def end(self, trial: str, **outcome: Any) -> None:
        self._write({"event": "ended", "trial": trial, **outcome})

    def stop(self, trial: str, metrics: Iterable[str]) -> None:
        """It ended on the way, and tells nothing more: with what was measured last."""
        last = (self.records[trial].reports or [{}])[-1]
        values = {metric: last[metric] for metric in metrics if metric in last}
        progress = {name: last.get(name) for name in PROGRESS}
        self.end(trial, state="stopped", values=values, **progress, seconds=None, error="")

    def spend(self, seconds: float) -> None:
        """`seconds` of this invocation so far."""
        self._append({"event": "spent", "seconds": seconds, "before": self.spent})

    @property
    def open(self) -> list[TrialStart]:
        """Begun and not ended, in the order in which they were begun."""
        return [record.begun for record in self.records.values() if record.ended is None]

    @property
    def ended(self) -> list[JournalRecord]:
        return [record for record in self.records.values() if record.ended is not None]

    def _write(self, line: dict[str, Any]) -> None:
        self._append(line)
        self._fold(line)

    def _append(self, line: dict[str, Any]) -> None:
        size = self._path.stat().st_size if self._path.exists() else 0
        try:
            with self._path.open("a", encoding="utf-8") as file:  # not kept open: Tune pickles who has a journal
                file.write(json.dumps(line) + "\n")
        except OSError:
            with suppress(OSError):  # on a full disk half a line may be there, and the next one would come right after
                os.truncate(self._path, size)
            raise

    def _fold(self, line: dict[str, Any]) -> None:
        told = {name: value for name, value in line.items() if name != "event"}
        match line["event"]:
            case "begun":
                self.records[told["trial"]] = JournalRecord(TrialStart(**told))
            case "report":
                self.records[told["trial"]].reports.append(told["result"])
            case "ended":
                self.records[told.pop("trial")].ended = told
            case "spent":
                self.spent = told["before"] + told["seconds"]


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """A line that a killed writer left half-written is the last one, and is cut off."""
    if not path.exists():
        return
    text = path.read_text(encoding="utf-8")
    if whole := text[: text.rfind("\n") + 1]:
        yield from (json.loads(line) for line in whole.splitlines())
    if whole != text:
        os.truncate(path, len(whole.encode()))
