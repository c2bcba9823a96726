"""Tune's trials, told to the event log."""

from __future__ import annotations

from typing import Any

from ray.tune import Callback

from tunery.search.space import trial_id
from tunery.search.trial import FINISHED
from tunery.track.events import EventLog


class TellTrials(Callback):  # type: ignore[misc]
    def __init__(self, log: EventLog, metric: str) -> None:
        self._log = log
        self._key = metric.split(".")[-1]

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._log.write("trial_started", trial=trial_id(trial.config), overrides=trial.config)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        result = trial.last_result or {}
        self._finished(trial, "done" if result.get(FINISHED) else "stopped", "")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._finished(trial, "failed", str(trial.get_error() or ""))

    def _finished(self, trial: Any, state: str, error: str) -> None:
        result = trial.last_result or {}
        self._log.write(
            "trial_finished",
            trial=trial_id(trial.config),
            overrides=trial.config,
            state=state,
            value=result.get(self._key),
            seconds=result.get("time_total_s"),
            error=error,
        )
