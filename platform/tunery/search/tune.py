"""Run a search with Ray Tune. The result is an artifact in the store, like that of a stage."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tunery.errors import StageError
from tunery.events.event_log import EventLog
from tunery.events.ranking import objective_value
from tunery.interrupt import interruptible
from tunery.pipeline.cache_keys import fingerprints
from tunery.pipeline.diagnose import diagnose
from tunery.pipeline.run_context import RunContext
from tunery.search.journal import Journal, JournalRecord, TrialStart
from tunery.search.outcome import search_facts
from tunery.search.pack_eligibility import pack_size, search_unpackable_reason
from tunery.search.population import Population
from tunery.search.space import curve_stage, metric_stages, trial_experiment, with_seed
from tunery.search.steering import SearchControl
from tunery.search.suggest import suggester
from tunery.search.trial import CLEANUP_SECONDS, TrialFunction
from tunery.search.warm_start import earlier_trials
from tunery.spec import Experiment, Search
from tunery.spec.graph import with_upstream
from tunery.spec.overrides import with_overrides
from tunery.store import Artifact, Lease, LeaseHeld, fingerprint, new_output_dir

VERSION = 3
"""Part of the cache key; increased when a change makes a search choose other trials."""
TUNE_ENV = {
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # a search resumes from its journal, not from Tune's experiment state
    "TUNE_WARN_THRESHOLD_S": "60",
}


@dataclass(frozen=True)
class Capacity:
    """Number of workers available for trials, and the reason for that number."""

    workers: int
    reason: str


def run_search(
    experiment: Experiment, run_context: RunContext, log: EventLog, capacity: Capacity | None, max_progress: float
) -> Artifact:
    """Return the search artifact, whose facts are the ranked trials and the winner (search/outcome.py).

    `capacity` may be None if the artifact is already in the store, so that Ray has not been started. `max_progress` is
    the estimated length of the longest trial in the search's `progress_unit`. Raises StageError if no trial finished.
    """
    search = experiment.search
    assert search is not None, "called for experiments with a search"
    cache_key, key_inputs = search_fingerprint(experiment, run_context)
    size = _effective_pack_size(experiment, _unpackable_reasons(experiment))
    log.write(
        "search_started",
        fingerprint=cache_key,
        **search.describe(),
        max_concurrent=_max_concurrent_trials(capacity, size, search) if capacity else None,
        reason=_concurrency_reason(capacity, size) if capacity else "",
    )
    cached = artifact = run_context.store.find("search", cache_key)
    if artifact is None:
        assert capacity is not None, "a search that is not in the store needs Ray"
        with run_context.store.lease("search", cache_key, lambda holder: time.sleep(1)) as lease:
            # Another run may have committed the same search while this one waited for the lease.
            cached = artifact = run_context.store.find("search", cache_key)
            if artifact is None:
                artifact = _run_and_commit(
                    experiment, run_context, log, capacity, max_progress, cache_key, key_inputs, lease
                )
    if cached is not None:
        for trial in cached.facts["trials"]:
            log.write("trial_finished", **trial)
    best = artifact.facts["best"]
    log.write(
        "search_finished",
        best=best["trial"],
        best_overrides=best["overrides"],
        value=best["value"],
        seconds=artifact.facts["seconds"],
        ended_by=artifact.facts["ended_by"],
        standings=artifact.facts["standings"],
        ties=artifact.facts["ties"],
        pareto_front=artifact.facts["pareto_front"],
        # A run whose search is cached executes no trial that would log them.
        best_fingerprints=fingerprints(with_overrides(experiment, best["overrides"]), run_context.folder),
    )
    return artifact


def search_fingerprint(experiment: Experiment, run_context: RunContext) -> tuple[str, dict[str, Any]]:
    """Return the cache key of the search and what it is computed from: the search config, the cache keys of all stages
    that its metrics depend on, and the trials of its warm start."""
    search = experiment.search
    assert search is not None, "called for experiments with a search"
    folder = run_context.folder
    required = experiment.model_copy(update={"stages": with_upstream(experiment.stages, metric_stages(search))})
    inputs = fingerprints(required, folder)
    for path, dimension in search.space.items():
        for value in dimension.choice or dimension.grid or ():  # a value may select other stages, files or models
            with suppress(ValueError):  # a value that is valid only together with another one (`when`)
                trial = trial_experiment(experiment, {path: value})
                for name, cache_key in fingerprints(trial, folder).items():
                    inputs[f"{path}={value}: {name}"] = cache_key
    identity = {"version": VERSION, "seed": experiment.seed, **search.model_dump(mode="json")}
    if search.warm_start:
        identity["earlier"] = [trial["trial"] for trial in earlier_trials(search, run_context.store)]
    return fingerprint("search", identity, inputs), {"identity": identity, "inputs": inputs}


def _effective_pack_size(experiment: Experiment, reasons: set[str]) -> int:
    """Maximum number of trials in a pack; 1 if no trial can be packed (`reasons` from _unpackable_reasons)."""
    return pack_size(experiment) if "" in reasons else 1


def _unpackable_reasons(experiment: Experiment) -> set[str]:
    """Reasons why trials cannot be packed; "" for trials that can. Trials differ: one choice of the space may select an
    adapter that can be packed, another one that cannot."""
    assert experiment.search is not None, "only a search has trials"
    searched = {path.split(".")[0] for path in experiment.search.space}
    reasons = set()
    for path, dimension in experiment.search.space.items():
        for value in dimension.values:
            with suppress(ValueError):
                reasons.add(search_unpackable_reason(trial_experiment(experiment, {path: value}), searched))
    return reasons


def _max_concurrent_trials(capacity: Capacity, size: int, search: Search) -> int:
    # Hyperband fills a bracket, and PBT a population, only when all trials exist, running or paused.
    if search.scheduler in ("hyperband", "pbt"):
        return search.trials
    return min(search.trials, capacity.workers * size)


def _concurrency_reason(capacity: Capacity, size: int) -> str:
    return capacity.reason + (f", {size} per pack" if size > 1 else "")


def _run_and_commit(
    experiment: Experiment,
    run_context: RunContext,
    log: EventLog,
    capacity: Capacity,
    max_progress: float,
    cache_key: str,
    key_inputs: dict[str, Any],
    lease: Lease,
) -> Artifact:
    search = experiment.search
    assert search is not None, "checked by run_search"
    staging_dir = run_context.store.staging_dir("search", cache_key)
    journal = Journal(staging_dir / "journal.jsonl")
    start_time = time.time()
    try:
        ended_by = _run_tuner(experiment, run_context, log, capacity, max_progress, staging_dir, journal)
    except BaseException as error:
        with suppress(OSError):  # on a full disk the original error matters more than the elapsed time
            journal.add_elapsed(time.time() - start_time)
        if isinstance(error, Exception):
            raise diagnose(error, "search", run_context) from error
        raise
    journal.add_elapsed(time.time() - start_time)
    facts = search_facts(search, list(journal.records.values()), ended_by)
    if facts["best"] is None:
        errors = "\n  ".join(sorted({trial["error"] for trial in facts["trials"] if trial["error"]})[:3])
        raise StageError("search", "no trial finished", cause=errors, remedy="see the logs of the trials in the report")
    out = new_output_dir(staging_dir, lease)
    (out / "trials.json").write_text(json.dumps(facts["trials"], indent=1) + "\n")
    artifact = run_context.store.commit(
        out,
        {"kind": "search", "fingerprint": cache_key, **key_inputs, "facts": facts},
        {"seconds": journal.elapsed + time.time() - start_time},
        lease,
    )
    shutil.rmtree(staging_dir, ignore_errors=True)
    SearchControl(run_context.run).clear()
    _remove_staging_dirs(experiment, run_context, list(journal.records.values()))
    return artifact


def _remove_staging_dirs(experiment: Experiment, run_context: RunContext, records: list[JournalRecord]) -> None:
    """Delete the checkpoints of stopped trials: after the search no trial resumes from them."""
    deadline = time.monotonic() + CLEANUP_SECONDS

    def wait(holder: str) -> None:
        if time.monotonic() > deadline:  # not a trial that is ending, but another run that builds it
            raise LeaseHeld(holder)

    for record in records:
        if record.outcome is not None and record.outcome["state"] != "stopped":
            continue
        trial = trial_experiment(experiment, record.start.overrides)
        for name, cache_key in fingerprints(trial, run_context.folder).items():
            kind = trial.stages[name].kind
            with suppress(LeaseHeld), run_context.store.lease(kind, cache_key, wait):
                shutil.rmtree(run_context.store.staging_dir(kind, cache_key), ignore_errors=True)


def _run_tuner(
    experiment: Experiment,
    run_context: RunContext,
    log: EventLog,
    capacity: Capacity,
    max_progress: float,
    staging_dir: Path,
    journal: Journal,
) -> str:
    """Run all trials. Returns why the search ended before its last trial, "" if it did not.

    A resumed search creates a new Tuner too. Tuner.restore of Ray 2.60 loses the rungs of ASHA, and restores a single
    trial without values if its state file is truncated. The journal has the sampled values and the outcomes; the store
    has the finished stages of unfinished trials, and the checkpoints of the others.
    """
    from ray import tune

    from tunery.search.budget import BudgetStopper
    from tunery.search.pbt_scheduler import PbtScheduler
    from tunery.search.progress import JournalCallback
    from tunery.search.queue import Queue
    from tunery.search.schedulers import build_scheduler
    from tunery.training.packed.pack_server import close_pack_scheduler, start_pack_scheduler

    os.environ.update(TUNE_ENV)
    shutil.rmtree(staging_dir / "tune", ignore_errors=True)
    search = experiment.search
    assert search is not None, "checked by run_search"
    compute = experiment.compute
    reasons = _unpackable_reasons(experiment)
    size = _effective_pack_size(experiment, reasons)
    pack_scheduler = start_pack_scheduler(capacity.workers, size, compute) if size > 1 else None
    checkpoint_dir = staging_dir / "kept" if search.scheduler == "pbt" else None
    # Tune changes the working directory of a trial, so the path of the experiment must be absolute.
    function = TrialFunction(
        experiment,
        dataclasses.replace(run_context, file=run_context.file.absolute()),
        pack_scheduler,
        checkpoint_dir,
    )
    control = SearchControl(run_context.run)
    if not journal.records:
        control.clear_stops()
    scheduler: Any
    population = None
    if checkpoint_dir is not None:
        population = _restore_population(experiment, journal, control)
        scheduler = PbtScheduler(
            population, control, checkpoint_dir, time_share=search.trials > capacity.workers * size
        )
    else:
        scheduler = build_scheduler(search, max_progress, journal)
    assert compute.workers_per_trial != "auto", "resolved before a search"
    devices_per_trial = compute.workers_per_trial * (1 if compute.device == "gpu" else compute.cpus_per_worker)
    stopper = BudgetStopper(search, journal, capacity.workers * devices_per_trial)
    queue = Queue(
        search,
        journal,
        suggester(search, experiment.seed, staging_dir, earlier_trials(search, run_context.store)),
        control,
        _max_concurrent_trials(capacity, size, search),
        partial(with_seed, experiment),
        partial(_log_trial_finished, log, journal, search),
        population,
        partial(_invalid_reason, experiment),
    )
    tuner = tune.Tuner(
        tune.with_resources(function.__call__, partial(_trial_resources, function, compute)),
        param_space={},
        tune_config=tune.TuneConfig(
            num_samples=-1,
            max_concurrent_trials=_max_concurrent_trials(capacity, size, search),
            search_alg=queue,
            scheduler=scheduler,
            # A reused actor keeps its resources until a trial with the same resources comes: with packed and unpacked
            # trials in one search, packs would wait for the device forever.
            reuse_actors=compute.workers_per_trial == 1 and not (pack_scheduler is not None and any(reasons)),
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: f"{trial.config['trial']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(staging_dir),
            verbose=0,
            stop=stopper,
            callbacks=[JournalCallback(log, journal, search, run_context)],
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    interruptible(tuner.fit)
    if pack_scheduler is not None:
        close_pack_scheduler(pack_scheduler)
    # Tune (2.60) calls no callback for trials that a Stopper ends. Without a Stopper no trial is open here.
    for start in journal.open_trials:
        journal.mark_stopped(start.trial, search.metrics)
        _log_trial_finished(log, journal, search, start)
    return stopper.reason


def _restore_population(experiment: Experiment, journal: Journal, control: SearchControl) -> Population:
    """Rebuild the population from the journal of an earlier attempt, and repeat the stop requests that it decided."""
    stage = curve_stage(experiment)
    assert experiment.search is not None, "checked by run_search"
    assert stage is not None, "checked by spec/check_search.py"
    training: Any = experiment.stages[stage]
    population = Population(experiment.search, stage, training.num_evals, experiment.seed)
    population.replay(journal.records.values())
    for member in population.to_stop:
        control.request_stop(member)
    population.to_stop.clear()
    return population


def _log_trial_finished(log: EventLog, journal: Journal, search: Search, start: TrialStart) -> None:
    outcome = journal.records[start.trial].outcome or {}
    value = objective_value(search, outcome["values"]) if outcome["values"] else None
    fields = {"overrides": start.overrides, "origin": start.origin, "of": start.of}
    log.write("trial_finished", trial=start.trial, **fields, **outcome, value=value)


def _invalid_reason(experiment: Experiment, overrides: dict[str, Any]) -> str:
    try:
        trial_experiment(experiment, overrides)
    except ValueError as error:  # a pydantic ValidationError or a PathError
        return f"these values are not valid for the experiment any more: {error}"
    return ""


def _trial_resources(function: TrialFunction, compute: Any, config: dict[str, Any]) -> Any:
    """Resources of a trial's driver process.

    If a pack or the workers of Ray Train do the training, the driver reserves nothing: 0.01 CPU would already keep the
    last worker from starting. One byte of memory, because Tune (2.60) rejects a trial without resources.
    """
    from ray.tune import PlacementGroupFactory

    trains_in_driver = compute.workers_per_trial == 1 and function.unpackable_reason(config["overrides"])
    if not trains_in_driver:
        return PlacementGroupFactory([{"CPU": 0, "memory": 1}])
    gpu = {"GPU": 1.0} if compute.device == "gpu" else {}
    return PlacementGroupFactory([{"CPU": float(compute.cpus_per_worker), **gpu}])
