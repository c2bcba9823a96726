"""The search as a whole: Ray Tune over trials, its outcome an artifact like any other."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.errors import StageError
from tunery.interrupt import interruptible
from tunery.runner.execute import Where
from tunery.runner.failures import explain
from tunery.runner.identity import fingerprints
from tunery.search.space import metric_stage, most_rows, parameter_space, trial_experiment, trial_id
from tunery.search.trial import FINISHED, TrialFunction
from tunery.spec import Experiment
from tunery.spec.graph import closure
from tunery.spec.overrides import with_overrides
from tunery.store import Artifact, LeaseHeld, fingerprint
from tunery.track.events import EventLog

VERSION = 1
"""Raised when a change makes a search give other trials."""
REDUCTION_FACTOR = 3
"""ASHA keeps the best third at each rung (eta in the paper)."""


@dataclass(frozen=True)
class Room:
    """How many trials run at once, and why."""

    trials: int
    reason: str


def run_search(experiment: Experiment, where: Where, log: EventLog, room: Room | None, rows: int) -> Artifact:
    """The search's artifact: facts are the trials and the best one's overrides.

    `room` may be None when Ray has not been started, because the search is known to be done. `rows` is how many rows
    the searched training sees at most in an epoch. Raises StageError when no trial ended.
    """
    search = experiment.search
    assert search is not None, "called for experiments with a search"
    print_, described = search_fingerprint(experiment, where.folder)
    log.write(
        "search_started",
        metric=search.metric,
        mode=search.mode,
        trials=search.trials,
        scheduler=search.scheduler,
        space={path: dimension.describe() for path, dimension in search.space.items()},
        max_concurrent=room.trials if room else None,
        reason=room.reason if room else "",
    )
    artifact = where.store.find("search", print_)
    if artifact is None:
        assert room is not None, "a search that is not done needs Ray"
        with where.store.lease("search", print_, lambda holder: time.sleep(1)):
            artifact = where.store.find("search", print_) or _search(
                experiment, where, log, room, rows, print_, described
            )
    else:
        for trial in artifact.facts["trials"]:
            log.write("trial_finished", **trial)
    best = artifact.facts["best"]
    log.write(
        "search_finished",
        best=best["trial"],
        best_overrides=best["overrides"],
        value=best["value"],
        seconds=artifact.facts["seconds"],
        best_fingerprints=_fingerprints_of(experiment, where, best["overrides"]),
    )
    return artifact


def _fingerprints_of(experiment: Experiment, where: Where, overrides: dict[str, Any]) -> dict[str, str]:
    """By stage. A run that finds its search in the store has no trial that would tell what it made."""
    known = fingerprints(with_overrides(experiment, overrides), where.folder)
    return {name: print_ for name, (print_, _, _) in known.items()}


def search_fingerprint(experiment: Experiment, folder: Path) -> tuple[str, dict[str, Any]]:
    """A search depends on its spec and on every stage that its metric needs."""
    assert experiment.search is not None, "called for experiments with a search"
    needed = experiment.model_copy(
        update={"stages": closure(experiment.stages, [metric_stage(experiment.search.metric)])}
    )
    inputs = {name: item[0] for name, item in fingerprints(needed, folder).items()}
    for path, dimension in experiment.search.space.items():
        for value in dimension.choice or ():  # a choice may lead to other stages, files or models
            trial = trial_experiment(experiment, {path: value})
            for name, item in fingerprints(trial, folder).items():
                inputs[f"{path}={value}: {name}"] = item[0]
    identity = {"version": VERSION, "seed": experiment.seed, **experiment.search.model_dump(mode="json")}
    return fingerprint("search", identity, inputs), {"identity": identity, "inputs": inputs}


def _search(
    experiment: Experiment, where: Where, log: EventLog, room: Room, rows: int, print_: str, described: dict[str, Any]
) -> Artifact:
    search = experiment.search
    assert search is not None, "checked by run_search"
    work = where.store.work("search", print_)
    begin = time.time()
    try:
        results = interruptible(_tuner(experiment, where, log, room, rows, work).fit)
    except Exception as error:
        raise explain(error, "search", where) from error
    outcomes = [_outcome(result, search.metric) for result in results]
    trials: list[dict[str, Any]] = []
    for outcome in sorted(outcomes, key=lambda trial: _rank(trial, search.mode)):
        if outcome["trial"] not in {trial["trial"] for trial in trials}:  # the same values drawn twice are one trial
            trials.append(outcome)
    if _rank(trials[0], search.mode)[0]:
        errors = "\n  ".join(sorted({trial["error"] for trial in trials if trial["error"]})[:3])
        raise StageError("search", "no trial ran to its end", cause=errors, remedy="see the trials' logs in the report")
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "trials.json").write_text(json.dumps(trials, indent=1) + "\n")
    artifact = where.store.commit(
        out,
        {"kind": "search", "fingerprint": print_, **described, "facts": {"trials": trials, "best": trials[0]}},
        {"seconds": time.time() - begin},
    )
    shutil.rmtree(work, ignore_errors=True)
    _drop_leftovers(experiment, where, trials)
    return artifact


def _drop_leftovers(experiment: Experiment, where: Where, trials: list[dict[str, Any]]) -> None:
    """Stopped trials leave checkpoints behind that nobody goes on from once the search is over."""
    for trial in trials:
        if trial["state"] != "stopped":
            continue
        stages = trial_experiment(experiment, trial["overrides"])
        for name, (print_, _, _) in fingerprints(stages, where.folder).items():
            kind = stages.stages[name].kind
            with suppress(LeaseHeld), where.store.lease(kind, print_):  # another run may be at it
                shutil.rmtree(where.store.work(kind, print_), ignore_errors=True)


def _tuner(experiment: Experiment, where: Where, log: EventLog, room: Room, rows: int, work: Path) -> Any:
    """A new one also when an earlier try was cut off: the same seed draws the same trials, and what those had made
    comes from the store, finished models whole and unfinished ones from their checkpoints. (Tuner.restore of Ray 2.60
    forgets ASHA's rungs, and falls back to a single trial without values when its state was cut off in the writing.)
    """
    from ray import tune
    from ray.tune.search.basic_variant import BasicVariantGenerator

    from tunery.search.progress import TellTrials

    shutil.rmtree(work / "tune", ignore_errors=True)
    search = experiment.search
    assert search is not None, "checked by run_search"
    key = search.metric.split(".")[-1]
    compute = experiment.compute
    in_process = compute.workers_per_trial == 1
    resources: dict[str, float] = {"CPU": compute.cpus_per_worker, "GPU": 1 if compute.device == "gpu" else 0}
    if not in_process:
        # Its workers take the CPUs and GPUs, and the driver must hold none of them: a hundredth of a CPU would keep
        # the last worker out. A byte of memory, because Tune (2.60) refuses a trial without any resource.
        resources = {"CPU": 0, "memory": 1}
    # A trial runs in a folder of Tune's: a relative path would lead nowhere there.
    there = dataclasses.replace(where, file=where.file.absolute())
    trainable = tune.with_resources(TrialFunction(experiment, there).__call__, resources)
    scheduler = None
    if search.scheduler == "asha":
        longest = most_rows(experiment, rows)
        scheduler = tune.schedulers.ASHAScheduler(
            time_attr="rows",
            metric=key,
            mode=search.mode,
            max_t=max(longest, REDUCTION_FACTOR**2),
            grace_period=max(1, longest // REDUCTION_FACTOR**2),
            reduction_factor=REDUCTION_FACTOR,
            stop_last_trials=False,  # a trial ends by itself, with its model; at max_t it would be stopped before
        )
    return tune.Tuner(
        trainable,
        param_space=parameter_space(search),
        tune_config=tune.TuneConfig(
            # A scheduler brings metric and mode itself.
            metric=None if scheduler else key,
            mode=None if scheduler else search.mode,
            num_samples=1 if search.algorithm == "grid" else search.trials,
            search_alg=BasicVariantGenerator(random_state=experiment.seed),
            scheduler=scheduler,
            max_concurrent_trials=room.trials,
            reuse_actors=in_process,
            trial_name_creator=lambda trial: trial_id(trial.config),
            trial_dirname_creator=lambda trial: f"{trial_id(trial.config)}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(work),
            verbose=0,
            callbacks=[TellTrials(log, search.metric)],
            failure_config=tune.FailureConfig(max_failures=0),
        ),
    )


def _outcome(result: Any, metric: str) -> dict[str, Any]:
    overrides = dict(result.config or {})
    metrics = result.metrics or {}
    value = metrics.get(metric.split(".")[-1])
    state = "failed" if result.error else "done" if metrics.get(FINISHED) else "stopped"
    return {
        "trial": trial_id(overrides),
        "overrides": overrides,
        "state": state,
        "value": value,
        "rows": metrics.get("rows"),
        "seconds": metrics.get("time_total_s"),
        "error": _first_line(result.error) if result.error else "",
    }


def _first_line(error: BaseException) -> str:
    return next((line for line in reversed(str(error).strip().splitlines()) if line.strip()), type(error).__name__)


def _rank(trial: dict[str, Any], mode: str) -> tuple[bool, float]:
    """Trials that ran to their end first, best first: a stopped trial has no model."""
    value = trial["value"] if trial["value"] is not None else math.nan
    worst = math.isnan(value)
    return trial["state"] != "done" or worst, math.inf if worst else (value if mode == "min" else -value)
