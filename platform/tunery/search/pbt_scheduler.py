"""Ray Tune scheduler for population based training (search/population.py).

Tune's own PopulationBasedTraining (2.60) does not fit: it rejects other searchers, compares trials at different
progress, leaves the ranges of the space, and loses its state when it is killed.
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
    """`checkpoint_dir` has the checkpoints of the members, by trial.

    `time_share` is set if not all members can run at once: a member that has reported the undecided evaluation is
    paused. Otherwise it continues up to the next evaluation; only the work of the few replaced members is lost.
    """

    def __init__(self, population: Population, control: SearchControl, checkpoint_dir: Path, time_share: bool) -> None:
        super().__init__()
        self._population, self._control = population, control
        self._checkpoint_dir, self._time_share = checkpoint_dir, time_share

    def on_trial_add(self, controller: Any, trial: Trial) -> None:
        """Called also for the retry of a failed trial."""
        self._population.mark_running(trial.config["trial"])

    def on_trial_result(self, controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        name = trial.config["trial"]
        if "share" in result:  # the final report of a trial has none
            self._population.record(name, result)
            self._apply_decisions(controller, trial)
        if name in self._population.replaced:
            return str(TrialScheduler.STOP)
        pause = self._population.awaits_decision(name) if self._time_share else self._population.is_far_ahead(name)
        return str(TrialScheduler.PAUSE if pause else TrialScheduler.CONTINUE)

    def on_trial_complete(self, controller: Any, trial: Trial, result: dict[str, Any]) -> None:
        self._population.mark_ended(trial.config["trial"])

    def on_trial_error(self, controller: Any, trial: Trial) -> None:
        self._population.mark_ended(trial.config["trial"])

    def on_trial_remove(self, controller: Any, trial: Trial) -> None:
        self._population.mark_ended(trial.config["trial"])

    def choose_trial_to_run(self, controller: Any) -> Trial | None:
        self._apply_decisions(controller)
        trials = controller.get_trials()
        paused = [trial for trial in trials if trial.status == Trial.PAUSED and not self._awaits_decision(trial)]
        return next((trial for trial in trials if trial.status == Trial.PENDING), None) or next(iter(paused), None)

    def debug_string(self) -> str:
        return "population"

    def _awaits_decision(self, trial: Trial) -> bool:
        return self._population.awaits_decision(trial.config["trial"])

    def _apply_decisions(self, controller: Any, reporting: Trial | None = None) -> None:
        """Stop replaced members and delete stale checkpoints. `reporting` is stopped by its own on_trial_result."""
        self._population.decide()
        to_stop, self._population.to_stop = set(self._population.to_stop), []
        if not to_stop:
            return
        for trial in list(controller.get_trials()):
            if trial is reporting or trial.config["trial"] not in to_stop:
                continue
            if trial.status in (Trial.PAUSED, Trial.PENDING):
                controller.stop_trial(trial)
            elif trial.status == Trial.RUNNING:
                self._control.request_stop(trial.config["trial"])
        for name, step in self._population.stale_checkpoints():
            shutil.rmtree(self._checkpoint_dir / name / f"checkpoint-{step}", ignore_errors=True)
