"""Tune's schedulers, set up for rungs in tokens or steps, and told what a killed search had seen."""

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
"""The best third goes on at each rung (eta in the papers)."""
LONGEST = REDUCTION_FACTOR**2
"""The longest trial in the schedulers' own unit, so that there are rungs at a ninth and a third of it. Hyperband makes
a bracket for each power of eta up to it: in tokens it would want thousands of trials."""
PROGRESS = "progress"
SAMPLES = 3
"""Trials that the median is taken of, at least."""


def scheduler_of(search: Search, longest: float, journal: Journal) -> TrialScheduler | None:
    """`longest`: of a trial, in what rungs are measured in, about. None where nobody is stopped early."""
    if search.scheduler == "none":
        return None
    told = {"time_attr": PROGRESS, "metric": search.metric, "mode": search.mode}
    if search.scheduler == "asha":
        scheduler = tune.schedulers.ASHAScheduler(
            **told,
            max_t=LONGEST,
            grace_period=1,
            reduction_factor=REDUCTION_FACTOR,
            stop_last_trials=False,  # a trial ends by itself, with its model; at max_t it would be stopped before
        )
    elif search.scheduler == "median":
        scheduler = tune.schedulers.MedianStoppingRule(
            **told,
            grace_period=1,
            min_samples_required=SAMPLES,
            min_time_slice=float("inf"),  # else it pauses trials while there are few to compare with
        )
    else:
        scheduler = tune.schedulers.HyperBandScheduler(
            **told, max_t=LONGEST, reduction_factor=REDUCTION_FACTOR, stop_last_trials=False
        )
    units = search.progress_unit, longest / LONGEST
    if search.scheduler != "hyperband":  # that one's brackets are made of trials that wait, and nobody waits any more
        _remember(scheduler, journal, units)
    return Sparing(scheduler, units)


def _progress(result: dict[str, Any], units: tuple[str, float]) -> dict[str, Any]:
    rungs, unit = units
    return {**result, PROGRESS: result.get(rungs, 0.0) / unit}


@dataclass(frozen=True)
class _Ended:
    trial_id: str


def _remember(scheduler: TrialScheduler, journal: Journal, units: tuple[str, float]) -> None:
    """What ended trials reported. Of a trial these two want its id, and that it can be the key of a mapping."""
    for record in journal.ended:
        if record.begun.origin == "replicate":
            continue
        trial = _Ended(record.begun.trial)
        scheduler.on_trial_add(None, trial)
        for report in record.reports:
            scheduler.on_trial_result(None, trial, _progress(dict(report), units))


class Sparing(TrialScheduler):  # type: ignore[misc]
    """Asks another scheduler about all trials but those that repeat a good one: they have proved themselves, and are
    run to be measured at their end."""

    def __init__(self, scheduler: TrialScheduler, units: tuple[str, float]) -> None:
        """`units`: what progress is measured in, and how much of it is one of the scheduler's."""
        super().__init__()
        self._scheduler, self._units = scheduler, units
        self._seen: dict[str, float] = {}
        """Progress by trial. One that goes on from a checkpoint tells it all again, which no scheduler expects."""

    @property
    def metric(self) -> str:
        return str(self._scheduler.metric)

    @property
    def supports_buffered_results(self) -> bool:
        return bool(self._scheduler.supports_buffered_results)

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        return bool(self._scheduler.set_search_properties(metric, mode, **spec))

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        if not _is_spared(trial):
            self._scheduler.on_trial_add(controller, trial)

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        if not _is_spared(trial):
            self._scheduler.on_trial_error(controller, trial)

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if _is_spared(trial):
            return str(TrialScheduler.CONTINUE)
        if math.isnan(result.get(self.metric, 0.0)):  # to a scheduler nothing is worse than it, or better
            return str(TrialScheduler.STOP)
        told = _progress(result, self._units)
        if told[PROGRESS] <= self._seen.get(trial.trial_id, 0.0):
            return str(TrialScheduler.CONTINUE)
        self._seen[trial.trial_id] = told[PROGRESS]
        return str(self._scheduler.on_trial_result(controller, trial, told))

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        if not _is_spared(trial):
            self._scheduler.on_trial_complete(controller, trial, _progress(result or {}, self._units))

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        if not _is_spared(trial):
            self._scheduler.on_trial_remove(controller, trial)

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        chosen = self._scheduler.choose_trial_to_run(controller)
        if chosen is not None:
            return chosen
        waiting = (trial for trial in controller.get_trials() if trial.status == Trial.PENDING and _is_spared(trial))
        return next(waiting, None)

    def debug_string(self) -> str:
        return str(self._scheduler.debug_string())


def _is_spared(trial: Trial) -> bool:
    return bool(trial.config.get("origin") == "replicate")
