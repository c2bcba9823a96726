"""Ray Tune callback that writes the trials to the event log and the journal."""

from __future__ import annotations

import math
from typing import Any

from ray.tune import Callback

from tunery.events.event_log import EventLog
from tunery.events.ranking import feasible, objective_value
from tunery.pipeline.run_context import RunContext
from tunery.search.journal import PROGRESS, Journal
from tunery.search.trial import FINISHED, error_file
from tunery.spec import Search


class JournalCallback(Callback):  # type: ignore[misc]
    def __init__(self, log: EventLog, journal: Journal, search: Search, run_context: RunContext) -> None:
        self._log, self._journal, self._search, self._run_context = log, journal, search, run_context
        self._started: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        config = trial.config
        if config["trial"] not in self._started:  # a retry keeps the error of the first attempt
            self._started.add(config["trial"])
            error_file(self._run_context, config["trial"]).unlink(missing_ok=True)
        record = self._journal.records[config["trial"]]
        self._log.write(
            "trial_started",
            trial=config["trial"],
            overrides=config["overrides"],
            origin=record.start.origin,
            of=record.start.of,
        )

    def on_trial_result(self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **i: Any) -> None:
        if "share" in result:  # an evaluation; the final report of a trial has no share
            record = self._journal.records[trial.config["trial"]]
            if record.reports and result["steps"] <= record.reports[-1]["steps"]:
                return  # a training that resumes from a checkpoint reports its history again
            metrics = {name: result[name] for name in (*PROGRESS, "share", *self._search.metrics) if name in result}
            metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
            self._journal.report(trial.config["trial"], metrics)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self._record_end(trial, "done" if result.get(FINISHED) else "stopped", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        file = error_file(self._run_context, trial.config["trial"])
        error = file.read_text() if file.is_file() else str(trial.get_error() or "its process was killed")
        self._record_end(trial, "failed", error)

    def _record_end(self, trial: Any, state: str, error: str) -> None:
        name, result = trial.config["trial"], trial.last_result or {}
        reports = self._journal.records[name].reports
        if state == "stopped" and reports:
            # The last evaluation, which the driver of a trial with several workers does not receive itself.
            result = {**result, **reports[-1]}
        metrics = {metric: float(result[metric]) for metric in self._search.metrics if metric in result}
        values = {metric: value for metric, value in metrics.items() if not math.isnan(value)}
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
            value=objective_value(self._search, values) if values else None,
            feasible=feasible(self._search, values),
        )
