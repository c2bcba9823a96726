"""Ray Tune schedulers with progress in tokens or steps, restored from the journal of a killed search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from tunery.search.journal import Journal
from tunery.spec import Search

REDUCTION_FACTOR = 3
"""One in this many trials is promoted at each rung (eta in the papers)."""
MAX_T = REDUCTION_FACTOR**2
"""Length of the longest trial in the scheduler's own unit: rungs are at 1/9 and 1/3 of it. Hyperband creates a bracket
for each power of eta up to max_t, so with max_t in tokens it would need thousands of trials."""
PROGRESS = "progress"
MIN_SAMPLES = 3
"""Minimum number of trials for a median."""


@dataclass(frozen=True)
class _ProgressScale:
    """Converts `progress_unit` (tokens or steps) to the unit of the schedulers."""

    progress_unit: str
    size: float
    """Tokens or steps in one unit of the scheduler."""

    def with_progress(self, result: dict[str, Any]) -> dict[str, Any]:
        return {**result, PROGRESS: result.get(self.progress_unit, 0.0) / self.size}


def build_scheduler(search: Search, max_progress: float, journal: Journal) -> TrialScheduler | None:
    """Return the scheduler of the search; None if it stops no trial early. `max_progress` is the estimated length of
    the longest trial in the search's `progress_unit`."""
    if search.scheduler == "none":
        return None
    common = {"time_attr": PROGRESS, "metric": search.metric, "mode": search.mode}
    if search.scheduler == "asha":
        scheduler = tune.schedulers.ASHAScheduler(
            **common,
            max_t=MAX_T,
            grace_period=1,
            reduction_factor=REDUCTION_FACTOR,
            stop_last_trials=False,  # a trial must finish to save its model; at max_t it would be stopped
        )
    elif search.scheduler == "median":
        scheduler = tune.schedulers.MedianStoppingRule(
            **common,
            grace_period=1,
            min_samples_required=MIN_SAMPLES,
            min_time_slice=float("inf"),  # otherwise it pauses trials while there are few to compare with
        )
    else:
        scheduler = tune.schedulers.HyperBandScheduler(
            **common, max_t=MAX_T, reduction_factor=REDUCTION_FACTOR, stop_last_trials=False
        )
    scale = _ProgressScale(search.progress_unit, max_progress / MAX_T)
    if search.scheduler != "hyperband":  # its brackets consist of paused trials, and ended trials are never paused
        _replay_journal(scheduler, journal, scale)
    return ReplicateExemptScheduler(scheduler, scale)


@dataclass(frozen=True)
class _EndedTrial:
    """Replaces Tune's Trial for an ended trial: the schedulers only read its id and use it as a dictionary key."""

    trial_id: str


def _replay_journal(scheduler: TrialScheduler, journal: Journal, scale: _ProgressScale) -> None:
    """Pass the reports of ended trials to the scheduler."""
    for record in journal.ended_records:
        if record.start.origin == "replicate":
            continue
        trial = _EndedTrial(record.start.trial)
        scheduler.on_trial_add(None, trial)
        for report in record.reports:
            scheduler.on_trial_result(None, trial, scale.with_progress(dict(report)))


class ReplicateExemptScheduler(TrialScheduler):  # type: ignore[misc]
    """Delegates to another scheduler, except for replicates, which always run to the end: their final metrics are
    needed for the mean over seeds."""

    def __init__(self, scheduler: TrialScheduler, scale: _ProgressScale) -> None:
        super().__init__()
        self._scheduler, self._scale = scheduler, scale
        self._last_progress: dict[str, float] = {}
        """By trial. A trial that resumes from a checkpoint reports its history again, which no scheduler expects."""

    @property
    def metric(self) -> str:
        return str(self._scheduler.metric)

    @property
    def supports_buffered_results(self) -> bool:
        return bool(self._scheduler.supports_buffered_results)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return bool(self._scheduler.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        if not _is_replicate(trial):
            self._scheduler.on_trial_add(controller, trial)

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        if not _is_replicate(trial):
            self._scheduler.on_trial_error(controller, trial)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if _is_replicate(trial):
            return str(TrialScheduler.CONTINUE)
        if math.isnan(result.get(self.metric, 0.0)):  # the schedulers' comparisons are wrong for NaN
            return str(TrialScheduler.STOP)
        result = self._scale.with_progress(result)
        if result[PROGRESS] <= self._last_progress.get(trial.trial_id, 0.0):
            return str(TrialScheduler.CONTINUE)
        self._last_progress[trial.trial_id] = result[PROGRESS]
        return str(self._scheduler.on_trial_result(controller, trial, result))

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if not _is_replicate(trial):
            self._scheduler.on_trial_complete(controller, trial, self._scale.with_progress(result or {}))

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        if not _is_replicate(trial):
            self._scheduler.on_trial_remove(controller, trial)

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        chosen = self._scheduler.choose_trial_to_run(controller)
        if chosen is not None:
            return chosen
        pending = (trial for trial in controller.get_trials() if trial.status == Trial.PENDING and _is_replicate(trial))
        return next(pending, None)

    def debug_string(self) -> str:
        return str(self._scheduler.debug_string())


def _is_replicate(trial: Trial) -> bool:
    return bool(trial.config.get("origin") == "replicate")
