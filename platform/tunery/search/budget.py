"""Ray Tune stopper for the budget of a search."""

from __future__ import annotations

import time
from typing import Any

from ray.tune import Stopper

from tunery.events.ranking import cost, feasible
from tunery.search.journal import Journal
from tunery.spec import Search

JOURNAL_INTERVAL_S = 5.0
"""Seconds between two journal entries of the elapsed time."""


class BudgetStopper(Stopper):  # type: ignore[misc]
    """Stops all trials when the time budget is spent or the target is reached.

    Tune calls it after every result and on every iteration of its event loop. `devices` is the number of devices that
    the search occupies (GPUs, or CPUs without a GPU).
    """

    def __init__(self, search: Search, journal: Journal, devices: int) -> None:
        self._search, self._journal, self._devices = search, journal, max(1, devices)
        self._start_time = self._last_entry = time.time()
        self.reason = ""
        """Why the search was stopped; "" if it was not."""

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        now = time.time()
        if now - self._last_entry > JOURNAL_INTERVAL_S:
            self._last_entry = now
            self._journal.add_elapsed(now - self._start_time)
        self.reason = self.reason or self._stop_reason(now)
        return bool(self.reason)

    def _stop_reason(self, now: float) -> str:
        budget = self._search.budget
        hours = (self._journal.elapsed + now - self._start_time) / 3600
        if budget.hours is not None and hours >= budget.hours:
            return f"the budget of {budget.hours:g} hours is spent"
        if budget.gpu_hours is not None and hours * self._devices >= budget.gpu_hours:
            return f"the budget of {budget.gpu_hours:g} GPU-hours is spent"
        if budget.target is not None:
            for record in self._journal.ended_records:
                assert record.outcome is not None, "ended"
                values = record.outcome["values"]
                value = values.get(self._search.metric)
                is_candidate = record.outcome["state"] == "done" and feasible(self._search, values)
                if is_candidate and value is not None and self._reached(value, budget.target):
                    return f"{record.start.trial} has reached the target of {budget.target:g}"
        return ""

    def _reached(self, value: float, target: float) -> bool:
        return cost(self._search.mode, value) <= cost(self._search.mode, target)
