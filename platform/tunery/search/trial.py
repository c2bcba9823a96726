"""Trainable of Ray Tune: a driver that executes the stages of one trial and reports its metrics.

A trial trains in a pack with others if it can (search/pack_eligibility.py). Otherwise, with one worker, it trains in
its own process, which Tune reuses for the next trial (`reuse_actors`), so torch is imported once. With several workers
it starts a group of them.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tunery.errors import Stopped
from tunery.events.event_log import EventLog
from tunery.pipeline.cache_keys import fingerprints
from tunery.pipeline.execute import TrialContext, execute
from tunery.pipeline.run_context import RunContext
from tunery.search.pack_eligibility import search_unpackable_reason
from tunery.search.population import INITIAL_ORIGINS
from tunery.search.space import curve_stage, metric_value, trial_experiment
from tunery.search.steering import SearchControl
from tunery.spec import Experiment
from tunery.store import Artifact, Launcher
from tunery.training.launch import InProcessLauncher, PackLauncher, WorkersLauncher
from tunery.workers.worker_group import CLOSE_SECONDS, CurrentWorkerGroup

CLEANUP_SECONDS = 2 * CLOSE_SECONDS
"""How long a stopped trial has to close its workers, or to leave its pack."""
FINISHED = "finished"
"""Key in the final report of a trial that was not stopped."""


@dataclass(frozen=True)
class TrialFunction:
    """Tune's trainable. It is plain data, so it can be pickled to any host that has access to the store."""

    experiment: Experiment
    run_context: RunContext
    pack_scheduler: Any
    """None if no trial of the search can be packed."""
    checkpoint_dir: Path | None = None
    """Checkpoints of the members of a population (PBT), by trial."""

    def __call__(self, config: dict[str, Any]) -> None:
        from ray import tune

        search = self.experiment.search
        assert search is not None, "only a search has trials"
        identifier, overrides = config["trial"], config["overrides"]
        trial_spec = trial_experiment(self.experiment, overrides)
        curve = curve_stage(self.experiment)
        progress = {"steps": 0.0, "tokens": 0.0, "rows": 0.0}
        last_metrics = dict.fromkeys(search.metrics, math.nan)

        def report(stage: str, metrics: dict[str, float]) -> None:
            if stage == curve and metrics["steps"] > progress["steps"]:
                progress.update({name: metrics[name] for name in progress})
                last_metrics.update({name: metrics[name] for name in last_metrics if name in metrics})
                tune.report(metrics)

        log = EventLog(self.run_context.events / f"{identifier}.jsonl", trial=identifier)
        start_time = time.time()
        workers = CurrentWorkerGroup(self.run_context.logs)
        compute = trial_spec.compute
        stop_file = SearchControl(self.run_context.run).stop_file(identifier)

        def launcher(stage: str) -> Launcher:
            fields: dict[str, Any] = {"report": partial(report, stage), "stop_file": stop_file}
            if stage == curve:
                fields |= self._checkpoints(config)
            if not self.unpackable_reason(overrides):
                return PackLauncher(self.pack_scheduler, **fields)
            return InProcessLauncher(**fields) if compute.workers == 1 else WorkersLauncher(workers, compute, **fields)

        if compute.workers != 1 or not self.unpackable_reason(overrides):
            _wait_for_this_thread_at_cleanup()
        was_cached = curve is not None and self._is_cached(trial_spec, curve)
        try:
            artifacts = execute(trial_spec, self.run_context, log, launcher, TrialContext(identifier))
        except Stopped:
            # Tune (2.60) fails the whole search at a report without its metric.
            tune.report({**last_metrics, **progress, "seconds": time.time() - start_time})
            return
        except Exception as error:
            file = error_file(self.run_context, identifier)
            if not file.exists():  # the first error is the cause; a retry may fail for lack of memory or workers
                with suppress(OSError):  # on a full disk the original error must still be raised
                    file.write_text(str(error))
            raise
        finally:
            workers.close()
        if curve is not None and was_cached:
            # The training was in the store: replay its evaluations for the scheduler, except the last one, which is
            # part of this trial's final report.
            for point in _eval_points(curve, artifacts[curve])[:-1]:
                report(curve, point)
        values = {metric: metric_value(artifacts[metric.split(".")[0]].facts, metric) for metric in search.metrics}
        end = _final_progress(artifacts[curve]) if curve is not None else progress
        # The final progress must not be lower than what the scheduler has already received.
        final_progress = {name: max(value, end[name]) for name, value in progress.items()}
        tune.report({**values, **final_progress, FINISHED: 1.0, "seconds": time.time() - start_time})

    def _checkpoints(self, config: dict[str, Any]) -> dict[str, Path]:
        """Launcher fields of a member of a population: where it saves checkpoints, and which one it starts from."""
        if self.checkpoint_dir is None or config["origin"] not in (*INITIAL_ORIGINS, "pbt_child"):
            return {}
        fields = {"checkpoint_dir": self.checkpoint_dir / config["trial"]}
        if config["since"]:
            fields["resume_from"] = self.checkpoint_dir / config["of"] / f"checkpoint-{config['since']}"
        return fields

    def unpackable_reason(self, overrides: dict[str, Any]) -> str:
        """Return why a trial with these values cannot be packed; "" if it can."""
        if self.pack_scheduler is None:
            return "no trial of this search can be packed"
        return search_unpackable_reason(
            trial_experiment(self.experiment, overrides), {path.split(".")[0] for path in overrides}
        )

    def _is_cached(self, experiment: Experiment, stage: str) -> bool:
        cache_key = fingerprints(experiment, self.run_context.folder)[stage]
        return self.run_context.store.find(experiment.stages[stage].kind, cache_key) is not None


def _wait_for_this_thread_at_cleanup() -> None:
    """Make Tune wait until this thread has closed its workers or left its pack, if a scheduler stops the trial.
    Otherwise `FunctionTrainable.cleanup` (Ray 2.60) waits 0 s for the thread and ends the process: the resources of the
    workers stay reserved, and the pack trains on until it notices."""
    from ray.train._internal.session import get_session

    session = get_session()
    assert session is not None, "called by Tune"
    finish = session.finish
    session.finish = lambda timeout=None: finish(timeout=CLEANUP_SECONDS if timeout == 0 else timeout)


def error_file(run_context: RunContext, trial: str) -> Path:
    """File with the first error of a trial. Tune (2.60) keeps only the last error, as Ray's traceback."""
    return run_context.logs / f"{trial}-error.txt"


def _final_progress(artifact: Artifact) -> dict[str, float]:
    """Progress counters at the end of a training."""
    facts = artifact.facts
    rows = float(facts["steps"] * facts["global_batch_size"])
    return {"steps": float(facts["steps"]), "tokens": float(facts.get("tokens", rows)), "rows": rows}


def _eval_points(stage: str, artifact: Artifact) -> list[dict[str, float]]:
    """Return the evaluations in the training curve in the form in which they were reported. Tokens and rows are
    interpolated linearly."""
    history: Path = artifact.path / "history.jsonl"
    if not history.is_file():
        return []
    total = _final_progress(artifact)
    points = [json.loads(line) for line in history.read_text().splitlines()]
    return [
        {
            **{f"{stage}.{name}": value for name, value in point.items() if name.startswith("eval_")},
            "share": point["step"] / total["steps"],
            **{name: value * point["step"] / total["steps"] for name, value in total.items()},
        }
        for point in points
        if any(name.startswith("eval_") for name in point)
    ]
