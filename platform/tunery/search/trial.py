"""A trial: a small driver that makes the trial's own stages, and tells Tune how they go.

It trains in a pack with others where it can (search/pack_eligibility.py), and else, with one worker, in its own
process, which Tune keeps for the next trial (`reuse_actors`): torch is loaded once, not eight times. With several
workers it starts a Ray Train run of its own.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.errors import Stopped
from tunery.events.event_log import EventLog
from tunery.pipeline.cache_keys import fingerprints
from tunery.pipeline.execute import RunContext, TrialContext, execute
from tunery.search.pack_eligibility import search_unpackable_reason
from tunery.search.population import MEMBERS
from tunery.search.space import curve_stage, metric_of, trial_experiment
from tunery.search.steering import SearchControl
from tunery.spec import Experiment
from tunery.store import Artifact

FINISHED = "finished"
"""In a trial's last report: it ran to its end, and was not stopped."""


@dataclass(frozen=True)
class TrialFunction:
    """Tune's trainable; plain data, so that it travels to any host that sees the store."""

    experiment: Experiment
    where: RunContext
    desk: Any
    """None where no trial of the search can be packed."""
    kept: Path | None = None
    """Where a population keeps its members' checkpoints, by trial."""

    def __call__(self, config: dict[str, Any]) -> None:
        from ray import tune

        search = self.experiment.search
        assert search is not None, "only a search has trials"
        identifier, overrides = config["trial"], config["overrides"]
        trial_spec = trial_experiment(self.experiment, overrides)
        curve = curve_stage(self.experiment)
        packed = not self.alone(overrides)
        in_process = packed or trial_spec.compute.workers == 1
        last = {"steps": 0.0, "tokens": 0.0, "rows": 0.0}
        measured = dict.fromkeys(search.metrics, math.nan)

        def report(stage: str, metrics: dict[str, float]) -> None:
            if stage == curve and metrics["steps"] > last["steps"]:
                last.update({name: metrics[name] for name in last})
                measured.update({name: metrics[name] for name in measured if name in metrics})
                tune.report(metrics)

        def callbacks(stage: str) -> tuple[Any, ...]:
            if stage != curve or in_process:
                return ()
            from ray.tune.integration.ray_train import TuneReportCallback

            return (TuneReportCallback(),)

        log = EventLog(self.where.events / f"{identifier}.jsonl", trial=identifier)
        begin = time.time()
        how = TrialContext(
            identifier,
            in_process=in_process,
            desk=self.desk if packed else None,
            stop=SearchControl(self.where.run).stop_file(identifier),
            report=report,
            callbacks=callbacks,
            **self._checkpoints(config, curve),
        )
        made_before = curve is not None and self._is_made(trial_spec, curve)
        try:
            made = execute(trial_spec, self.where, log, how)
        except Stopped:
            # Tune (2.60) ends the whole search at a report without its metric.
            tune.report({**measured, **last, "seconds": time.time() - begin})
            return
        except Exception as error:
            told = error_file(self.where, identifier)
            if not told.exists():  # the first one tells most: after it there may be no memory, or no worker
                with suppress(OSError):  # a full disk must not hide itself
                    told.write_text(str(error))
            raise
        if curve is not None and made_before:
            # Trained by an earlier run: its evaluations are told to the scheduler as if they came now. Not the last
            # one: that is this trial's own last report.
            for point in _evaluations(curve, made[curve])[:-1]:
                report(curve, point)
        values = {metric: metric_of(made[metric.split(".")[0]].facts, metric) for metric in search.metrics}
        end = _progress(made[curve]) if curve is not None else last
        # A last report of its own: progress must not fall behind what the scheduler has seen.
        progress = {name: max(value, end[name]) for name, value in last.items()}
        tune.report({**values, **progress, FINISHED: 1.0, "seconds": time.time() - begin})

    def _checkpoints(self, config: dict[str, Any], curve: str | None) -> dict[str, Any]:
        """What a member of a population shares with others, and what it begins with."""
        if self.kept is None or curve is None or config["origin"] not in (*MEMBERS, "descendant"):
            return {}
        begins = self.kept / config["of"] / f"checkpoint-{config['since']}" if config["since"] else None
        return {"shares": curve, "kept": self.kept / config["trial"], "begins_with": begins}

    def alone(self, overrides: dict[str, Any]) -> str:
        """Why a trial with these values trains by itself; "" when in a pack."""
        if self.desk is None:
            return "no trial of this search can be packed"
        return search_unpackable_reason(
            trial_experiment(self.experiment, overrides), {path.split(".")[0] for path in overrides}
        )

    def _is_made(self, experiment: Experiment, stage: str) -> bool:
        print_ = fingerprints(experiment, self.where.folder)[stage][0]
        return self.where.store.find(experiment.stages[stage].kind, print_) is not None


def error_file(where: RunContext, trial: str) -> Path:
    """What a trial failed with at first. Tune (2.60) keeps the last error alone, as the library's traceback."""
    return where.logs / f"{trial}-error.txt"


def _progress(artifact: Artifact) -> dict[str, float]:
    """Of a whole training."""
    facts = artifact.facts
    rows = float(facts["steps"] * facts["global_batch_size"])
    return {"steps": float(facts["steps"]), "tokens": float(facts.get("tokens", rows)), "rows": rows}


def _evaluations(stage: str, artifact: Artifact) -> list[dict[str, float]]:
    """The points of a curve where the model was evaluated, as they were reported; tokens as if they had been learned
    from at an even pace."""
    history: Path = artifact.path / "history.jsonl"
    if not history.is_file():
        return []
    whole = _progress(artifact)
    points = [json.loads(line) for line in history.read_text().splitlines()]
    return [
        {
            **{f"{stage}.{name}": value for name, value in point.items() if name.startswith("eval_")},
            "share": point["step"] / whole["steps"],
            **{name: value * point["step"] / whole["steps"] for name, value in whole.items()},
        }
        for point in points
        if any(name.startswith("eval_") for name in point)
    ]
