"""A trial: a small driver that makes the trial's own stages, and tells Tune how they go.

With one worker a trial trains in its own process, which Tune keeps for the next trial (`reuse_actors`): torch is
loaded once, not eight times. With several it starts a Ray Train run of its own.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.runner.execute import Trial, Where, execute
from tunery.runner.identity import fingerprints
from tunery.search.space import curve_stage, metric_of, metric_stage, trial_experiment, trial_id
from tunery.spec import Experiment
from tunery.track.events import EventLog

FINISHED = "finished"
"""In a trial's last report: it ran to its end, and was not stopped."""


@dataclass(frozen=True)
class TrialFunction:
    """Tune's trainable; plain data, so that it travels to any host that sees the store."""

    experiment: Experiment
    where: Where

    def __call__(self, config: dict[str, Any]) -> None:
        from ray import tune

        assert self.experiment.search is not None, "only a search has trials"
        metric = self.experiment.search.metric
        key = metric.split(".")[-1]
        identifier = trial_id(config)
        trial_spec = trial_experiment(self.experiment, config)
        curve = curve_stage(self.experiment)
        in_process = trial_spec.compute.workers == 1
        last = {"rows": 0.0}

        def report(stage: str, metrics: dict[str, float]) -> None:
            if stage == curve and metrics["rows"] > last["rows"]:
                last["rows"] = metrics["rows"]
                tune.report(metrics)

        def callbacks(stage: str) -> tuple[Any, ...]:
            if stage != curve or in_process:
                return ()
            from ray.tune.integration.ray_train import TuneReportCallback

            return (TuneReportCallback(),)

        log = EventLog(self.where.events / f"{identifier}.jsonl", trial=identifier)
        begin = time.time()
        made_before = self._is_made(trial_spec, metric_stage(metric))
        made = execute(
            trial_spec, self.where, log, Trial(identifier, in_process=in_process, report=report, callbacks=callbacks)
        )
        artifact = made[metric_stage(metric)]
        if curve and made_before:
            # Trained by an earlier run: its evaluations are told to the scheduler as if they came now. Not the last
            # one: that is this trial's own last report.
            for point in _evaluations(artifact.path / "history.jsonl")[:-1]:
                report(curve, {name: point[name] for name in ("step", "rows", key)})
        value = metric_of(artifact.facts, metric)
        rows = artifact.facts.get("steps", 0) * artifact.facts.get("global_batch_size", 0)
        # A last report of its own: `rows` must not fall behind what the scheduler has seen.
        tune.report({key: value, "rows": float(max(rows, last["rows"])), FINISHED: 1.0, "seconds": time.time() - begin})

    def _is_made(self, experiment: Experiment, stage: str) -> bool:
        print_ = fingerprints(experiment, self.where.folder)[stage][0]
        return self.where.store.find(experiment.stages[stage].kind, print_) is not None


def _evaluations(history: Path) -> list[dict[str, float]]:
    """The points of a curve where the model was evaluated."""
    if not history.is_file():
        return []
    points = [json.loads(line) for line in history.read_text().splitlines()]
    return [point for point in points if "eval_loss" in point]
