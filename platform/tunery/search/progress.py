"""Tune's trials, told to the event log and to the journal."""

from __future__ import annotations

import math
from typing import Any

from ray.tune import Callback

from tunery.events.event_log import EventLog
from tunery.pipeline.execute import RunContext
from tunery.search.journal import PROGRESS, Journal
from tunery.search.ranking import feasible, value_of
from tunery.search.trial import FINISHED, error_file
from tunery.spec import Search


class JournalCallback(Callback):  # type: ignore[misc]
    def __init__(self, log: EventLog, journal: Journal, search: Search, where: RunContext) -> None:
        self._log, self._journal, self._search, self._where = log, journal, search, where
        self._begun: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        config = trial.config
        if config["trial"] not in self._begun:  # and not a second try
            self._begun.add(config["trial"])
            error_file(self._where, config["trial"]).unlink(missing_ok=True)
        record = self._journal.records[config["trial"]]
        self._log.write(
            "trial_started",
            trial=config["trial"],
            overrides=config["overrides"],
            origin=record.begun.origin,
            of=record.begun.of,
        )

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **i: Any) -> None:
        if "share" in result:  # an evaluation: a trial's last report has none
            record = self._journal.records[trial.config["trial"]]
            if record.reports and result["steps"] <= record.reports[-1]["steps"]:
                return  # a training that goes on from a checkpoint tells it all again
            told = {name: result[name] for name in (*PROGRESS, "share", *self._search.metrics) if name in result}
            told = {name: value for name, value in told.items() if not math.isnan(value)}
            self._journal.report(trial.config["trial"], told)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self._ended(trial, "done" if result.get(FINISHED) else "stopped", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        told = error_file(self._where, trial.config["trial"])
        error = told.read_text() if told.is_file() else str(trial.get_error() or "its process was killed")
        self._ended(trial, "failed", error)

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
            "error": error,
        }
        self._journal.end(name, **outcome)
        self._log.write(
            "trial_finished",
            trial=name,
            overrides=trial.config["overrides"],
            **outcome,
            value=value_of(self._search, values) if values else None,
            feasible=feasible(self._search, values),
        )
