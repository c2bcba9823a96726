"""A review under way: the sample, what is decided of it, and where that is kept. Knows nothing of HTTP."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

from tunery.review.decisions import Decision, DecisionLog
from tunery.review.review_items import ReviewItem


class UnknownRow(LookupError):
    """An id that isn't in the sample."""


class ReviewSession:
    """Safe for threads: one decision at a time, each on the disk before the next."""

    def __init__(
        self, stage: str, rows: Sequence[ReviewItem], log: DecisionLog, *, next_command: str, show_filter: bool = False
    ) -> None:
        self._stage, self._log = stage, log
        self._items = {item.id: item for item in rows}
        self._next_command, self._show_filter = next_command, show_filter
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        return len(self._items)

    @property
    def decided(self) -> int:
        with self._lock:
            return sum(id in self._log.decided for id in self._items)

    def state(self) -> dict[str, Any]:
        """All that the page shows but the rows themselves; of the filter no more than may be seen."""
        with self._lock:
            decided = {id: self._log.decided[id] for id in self._items if id in self._log.decided}
            last = self._log.last
        return {
            "stage": self._stage,
            "ids": list(self._items),
            "decided": decided,
            "undo": last.id if last is not None and last.id in self._items else None,
            "filter": {id: _told(item) for id, item in self._items.items() if id in decided or self._show_filter},
            "file": str(self._log.path),
            "next": self._next_command,
        }

    def row(self, id: str) -> dict[str, Any]:
        """Raises UnknownRow."""
        item = self._item(id)
        return {"id": item.id, "turns": item.turns}

    def decide(self, id: str, decision: Decision) -> dict[str, Any]:
        """Returns the new state, once the decision is on the disk. Raises UnknownRow, OSError."""
        self._item(id)
        with self._lock:
            self._log.decide(id, decision)
        return self.state()

    def undo(self) -> dict[str, Any]:
        """Takes the newest decision back, also one of an earlier session; "undone" in the state is its row, or None
        where there is nothing (more) to undo in this sample. Raises OSError."""
        with self._lock:
            last = self._log.last
            undone = self._log.undo() if last is not None and last.id in self._items else None
        return {**self.state(), "undone": undone}

    def _item(self, id: str) -> ReviewItem:
        if id not in self._items:
            raise UnknownRow(id)
        return self._items[id]


def _told(item: ReviewItem) -> dict[str, Any]:
    """JSON has no NaN and no infinity: a row without a score has none here."""
    verdict = item.verdict
    scores = [
        {"name": name, "value": _finite(value), "cut": _finite(verdict.cuts[name])}
        for name, value in verdict.scores.items()
    ]
    return {"decision": "keep" if verdict.keep else "drop", "scores": scores}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
