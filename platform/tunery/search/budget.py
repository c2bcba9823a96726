"""When a search has had enough."""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Stopper

from tunery.search.journal import Journal
from tunery.search.ranking import feasible
from tunery.spec import Search

TOLD_EVERY = 5.0
"""Seconds between two notes of the time spent, in the journal."""


class BudgetStopper(Stopper):  # type: ignore[misc]
    """Ends all trials when time is up or the target is met. Tune asks after every result and every step of its loop."""

    def __init__(self, search: Search, journal: Journal, devices: int) -> None:
        self._search, self._journal, self._devices = search, journal, max(1, devices)
        self._began = self._told = time.time()
        self.reason = ""
        """Why the search was ended; "" while it was not."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        now = time.time()
        if now - self._told > TOLD_EVERY:
            self._told = now
            self._journal.spend(now - self._began)
        self.reason = self.reason or self._why(now)
        return bool(self.reason)

    def _why(self, now: float) -> str:
        budget = self._search.budget
        hours = (self._journal.spent + now - self._began) / 3600
        if budget.hours is not None and hours >= budget.hours:
            return f"the budget of {budget.hours:g} hours is spent"
        if budget.gpu_hours is not None and hours * self._devices >= budget.gpu_hours:
            return f"the budget of {budget.gpu_hours:g} GPU-hours is spent"
        if budget.target is not None:
            for record in self._journal.ended:
                assert record.ended is not None, "ended"
                values = record.ended["values"]
                value = values.get(self._search.metric)
                may_win = record.ended["state"] == "done" and feasible(self._search, values)
                if may_win and value is not None and self._met(value, budget.target):
                    return f"{record.begun.trial} has reached the target of {budget.target:g}"
        return ""

    def _met(self, value: float, target: float) -> bool:
        return value <= target if self._search.mode == "min" else value >= target
