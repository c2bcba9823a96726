"""A review session: the sample, its decisions and the log they are written to. Independent of HTTP."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

from tunery.review.decisions import Decision, DecisionLog
from tunery.review.review_items import ReviewItem


class UnknownRow(LookupError):
    """The id isn't in the sample."""


class ReviewSession:
    """Thread-safe; each decision is on disk before the next one is accepted."""

    def __init__(
        self, stage: str, items: Sequence[ReviewItem], log: DecisionLog, *, next_command: str, show_filter: bool = False
    ) -> None:
        self._stage, self._log = stage, log
        self._items = {item.id: item for item in items}
        self._next_command, self._show_filter = next_command, show_filter
        self._lock = threading.Lock()

    @property
    def total(self) -> int:
        return len(self._items)

    @property
    def decided(self) -> int:
        """Number of rows of the sample with a decision."""
        with self._lock:
            return sum(id in self._log.decisions for id in self._items)

    def state(self) -> dict[str, Any]:
        """Return everything the page shows except the rows. The outcome of the filter is included only for decided
        rows, or for all rows with `show_filter`."""
        with self._lock:
            decisions = {id: self._log.decisions[id] for id in self._items if id in self._log.decisions}
            last_edit = self._log.last_edit
        return {
            "stage": self._stage,
            "ids": list(self._items),
            "decided": decisions,
            "undo": last_edit.id if last_edit is not None and last_edit.id in self._items else None,
            "filter": {
                id: _outcome_as_json(item) for id, item in self._items.items() if id in decisions or self._show_filter
            },
            "file": str(self._log.path),
            "next": self._next_command,
        }

    def row(self, id: str) -> dict[str, Any]:
        """Return the messages of a row. Raises UnknownRow."""
        item = self._find_item(id)
        return {"id": item.id, "messages": item.messages}

    def decide(self, id: str, decision: Decision) -> dict[str, Any]:
        """Return the new state once the decision is on disk. Raises UnknownRow, OSError."""
        self._find_item(id)
        with self._lock:
            self._log.decide(id, decision)
        return self.state()

    def undo(self) -> dict[str, Any]:
        """Undo the newest decision, which may be one of an earlier session. Raises OSError.

        Return the new state; "undone" is the id of the row, or None if there is nothing to undo in this sample.
        """
        with self._lock:
            last_edit = self._log.last_edit
            undone = self._log.undo() if last_edit is not None and last_edit.id in self._items else None
        return {**self.state(), "undone": undone}

    def _find_item(self, id: str) -> ReviewItem:
        if id not in self._items:
            raise UnknownRow(id)
        return self._items[id]


def _outcome_as_json(item: ReviewItem) -> dict[str, Any]:
    """A missing score is None, because JSON has no NaN."""
    outcome = item.outcome
    scores = [
        {"name": name, "value": _finite_or_none(value), "threshold": _finite_or_none(outcome.thresholds[name])}
        for name, value in outcome.scores.items()
    ]
    return {"decision": "keep" if outcome.keep else "drop", "scores": scores}


def _finite_or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
