"""Tune's trials, told to the event log and to the journal."""

from __future__ import annotations

import math
from typing import Any

from ray.tune import Callback

from tunery.search.journal import Journal
from tunery.search.ranking import value_of
from tunery.search.trial import FINISHED
from tunery.spec import Search
from tunery.track.events import EventLog

PROGRESS = ("steps", "tokens", "rows")


class TellTrials(Callback):  # type: ignore[misc]
    def __init__(self, log: EventLog, journal: Journal, search: Search) -> None:
        self._log, self._journal, self._search = log, journal, search

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        config = trial.config
        record = self._journal.records[config["trial"]]
        self._log.write(
            "trial_started",
            trial=config["trial"],
            overrides=config["overrides"],
            origin=record.begun.origin,
            of=record.begun.of,
        )

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **i: Any) -> None:
        if not result.get(FINISHED) and not math.isnan(result.get(self._search.metric, math.nan)):
            told = {name: result[name] for name in (*PROGRESS, *self._search.metrics) if name in result}
            self._journal.report(trial.config["trial"], told)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self._ended(trial, "done" if result.get(FINISHED) else "stopped", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended(trial, "failed", str(trial.get_error() or ""))

    def _ended(self, trial: Any, state: str, error: str) -> None:
        name, result = trial.config["trial"], trial.last_result or {}
        reports = self._journal.records[name].reports
        if state == "stopped" and reports:
            # What was measured last, by whomever: a trial with several workers hears nothing of it itself.
            result = {**result, **reports[-1]}
        found = {metric: float(result[metric]) for metric in self._search.metrics if metric in result}
        values = {metric: value for metric, value in found.items() if not math.isnan(value)}
        outcome = {
            "state": state,
            "values": values,
            **{key: result.get(key) for key in PROGRESS},
            "seconds": result.get("time_total_s"),
            "error": _last_line(error),
        }
        self._journal.end(name, **outcome)
        self._log.write(
            "trial_finished",
            trial=name,
            overrides=trial.config["overrides"],
            **{**outcome, "error": error},
            value=value_of(self._search, values) if values else None,
        )


def _last_line(error: str) -> str:
    return next((line for line in reversed(error.strip().splitlines()) if line.strip()), "")
