"""A population (search/population.py) as Tune's scheduler.

Not Tune's own PopulationBasedTraining (2.60): it refuses every searcher beside it, compares trials however far they
are, leaves the space's ranges, and forgets what it did when it is killed.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tunery.search.population import Population
from tunery.search.steering import SearchControl


class PbtScheduler(FIFOScheduler):  # type: ignore[misc]
    """`kept`: the members' checkpoints, by trial. `in_turn`: there is no room for all of them at once, so that a member
    which is ahead of what is decided is paused. Else it goes on, as far as the next evaluation: what it does beyond is
    in vain for a few."""

    def __init__(self, population: Population, steering: SearchControl, kept: Path, in_turn: bool) -> None:
        super().__init__()
        self._population, self._steering, self._kept, self._in_turn = population, steering, kept, in_turn

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        """Also of one that failed, and is tried again."""
        self._population.begin(trial.config["trial"])

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        name = trial.config["trial"]
        if "share" in result:  # the last report of all has none
            self._population.hear(name, result)
            self._decide(controller, trial)
        if name in self._population.replaced:
            return str(TrialScheduler.STOP)
        waits = self._population.waits(name) if self._in_turn else self._population.is_far_ahead(name)
        return str(TrialScheduler.PAUSE if waits else TrialScheduler.CONTINUE)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._population.end(trial.config["trial"])

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        self._population.end(trial.config["trial"])

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        self._population.end(trial.config["trial"])

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        self._decide(controller)
        trials = controller.get_trials()
        paused = [trial for trial in trials if trial.status == Trial.PAUSED and not self._waits(trial)]
        return next((trial for trial in trials if trial.status == Trial.PENDING), None) or next(iter(paused), None)

    def debug_string(self) -> str:
        return "population"

    def _waits(self, trial: Trial) -> bool:
        return self._population.waits(trial.config["trial"])

    def _decide(self, controller: Any, reporting: Trial | None = None) -> None:
        self._population.decide()
        leaving, self._population.leaving = set(self._population.leaving), []
        if not leaving:
            return
        for trial in list(controller.get_trials()):
            if trial is reporting or trial.config["trial"] not in leaving:
                continue
            if trial.status in (Trial.PAUSED, Trial.PENDING):
                controller.stop_trial(trial)
            elif trial.status == Trial.RUNNING:
                self._steering.stop(trial.config["trial"])
        for name, step in self._population.kept_in_vain():
            shutil.rmtree(self._kept / name / f"checkpoint-{step}", ignore_errors=True)
