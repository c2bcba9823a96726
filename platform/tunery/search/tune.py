"""The search as a whole: Ray Tune over trials, its outcome an artifact like any other."""

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
from tunery.interrupt import interruptible
from tunery.pipeline.cache_keys import fingerprints
from tunery.pipeline.diagnose import diagnose
from tunery.pipeline.execute import RunContext
from tunery.search.journal import Journal, JournalRecord, TrialStart
from tunery.search.outcome import facts_of
from tunery.search.pack_eligibility import pack_size, search_unpackable_reason
from tunery.search.population import Population
from tunery.search.ranking import value_of
from tunery.search.space import curve_stage, metric_stages, trial_experiment, with_seed
from tunery.search.steering import SearchControl
from tunery.search.suggest import suggester
from tunery.search.trial import TrialFunction
from tunery.search.warm_start import earlier_trials
from tunery.spec import Experiment, Search
from tunery.spec.graph import with_upstream
from tunery.spec.overrides import with_overrides
from tunery.store import Artifact, LeaseHeld, fingerprint

VERSION = 2
"""Raised when a change makes a search give other trials."""
QUIET = {
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # the journal is what a search goes on from, not Tune's own state
    "TUNE_WARN_THRESHOLD_S": "60",
}


@dataclass(frozen=True)
class Capacity:
    """How many workers there are for trials, and why."""

    workers: int
    reason: str


def run_search(
    experiment: Experiment, where: RunContext, log: EventLog, room: Capacity | None, longest: float
) -> Artifact:
    """The search's artifact: facts are the trials, best first, and the winner (search/outcome.py).

    `room` may be None when Ray has not been started, because the search is known to be done. `longest`: of a trial, in
    what its rungs are measured in, about. Raises StageError when no trial ended.
    """
    search = experiment.search
    assert search is not None, "called for experiments with a search"
    print_, described = search_fingerprint(experiment, where)
    size = _packed_by(experiment, _why_not_packed(experiment))
    log.write(
        "search_started",
        **search.describe(),
        max_concurrent=_at_once(room, size, search) if room else None,
        reason=_why(room, size) if room else "",
    )
    made = artifact = where.store.find("search", print_)
    if artifact is None:
        assert room is not None, "a search that is not done needs Ray"
        with where.store.lease("search", print_, lambda holder: time.sleep(1)):
            made = artifact = where.store.find("search", print_)  # by another run, meanwhile
            if artifact is None:
                artifact = _search(experiment, where, log, room, longest, print_, described)
    if made is not None:
        for trial in made.facts["trials"]:
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
        front=artifact.facts["front"],
        best_fingerprints=_fingerprints_of(experiment, where, best["overrides"]),
    )
    return artifact


def _fingerprints_of(experiment: Experiment, where: RunContext, overrides: dict[str, Any]) -> dict[str, str]:
    """By stage. A run that finds its search in the store has no trial that would tell what it made."""
    known = fingerprints(with_overrides(experiment, overrides), where.folder)
    return {name: print_ for name, (print_, _, _) in known.items()}


def search_fingerprint(experiment: Experiment, where: RunContext) -> tuple[str, dict[str, Any]]:
    """A search depends on its spec, on every stage that its metrics need, and on what it is warmed up with."""
    search = experiment.search
    assert search is not None, "called for experiments with a search"
    folder = where.folder
    needed = experiment.model_copy(update={"stages": with_upstream(experiment.stages, metric_stages(search))})
    inputs = {name: item[0] for name, item in fingerprints(needed, folder).items()}
    for path, dimension in search.space.items():
        for value in dimension.choice or dimension.grid or ():  # a choice may lead to other stages, files or models
            with suppress(ValueError):  # a value that needs another beside it (`when`)
                trial = trial_experiment(experiment, {path: value})
                for name, item in fingerprints(trial, folder).items():
                    inputs[f"{path}={value}: {name}"] = item[0]
    identity = {"version": VERSION, "seed": experiment.seed, **search.model_dump(mode="json")}
    if search.warm_start:
        identity["earlier"] = [trial["trial"] for trial in earlier_trials(search, where.store)]
    return fingerprint("search", identity, inputs), {"identity": identity, "inputs": inputs}


def _packed_by(experiment: Experiment, reasons: set[str]) -> int:
    """Members of a pack; 1 where no trial can be packed. `reasons`: why trials are not."""
    return pack_size(experiment) if "" in reasons else 1


def _why_not_packed(experiment: Experiment) -> set[str]:
    """Why trials train alone, "" where they don't. They differ: a choice may lead to a tuner that can be packed, and
    another to one that can't."""
    assert experiment.search is not None, "only a search has trials"
    searched = {path.split(".")[0] for path in experiment.search.space}
    found = set()
    for path, dimension in experiment.search.space.items():
        for value in dimension.values:
            with suppress(ValueError):
                found.add(search_unpackable_reason(trial_experiment(experiment, {path: value}), searched))
    return found


def _at_once(room: Capacity, size: int, search: Search) -> int:
    # A bracket is full, and a population whole, when all its trials are there, be they at work or waiting.
    if search.scheduler in ("hyperband", "pbt"):
        return search.trials
    return min(search.trials, room.workers * size)


def _why(room: Capacity, size: int) -> str:
    return room.reason + (f", {size} a pack" if size > 1 else "")


def _search(
    experiment: Experiment,
    where: RunContext,
    log: EventLog,
    room: Capacity,
    longest: float,
    print_: str,
    described: Any,
) -> Artifact:
    search = experiment.search
    assert search is not None, "checked by run_search"
    work = where.store.work("search", print_)
    journal = Journal(work / "journal.jsonl")
    begin = time.time()
    try:
        ended_by = _run(experiment, where, log, room, longest, work, journal)
    except BaseException as error:
        with suppress(OSError):  # on a full disk the error matters more than the time it took
            journal.spend(time.time() - begin)
        if isinstance(error, Exception):
            raise diagnose(error, "search", where) from error
        raise
    journal.spend(time.time() - begin)
    facts = facts_of(search, list(journal.records.values()), ended_by)
    if facts["best"] is None:
        errors = "\n  ".join(sorted({trial["error"] for trial in facts["trials"] if trial["error"]})[:3])
        raise StageError("search", "no trial ran to its end", cause=errors, remedy="see the trials' logs in the report")
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / "trials.json").write_text(json.dumps(facts["trials"], indent=1) + "\n")
    artifact = where.store.commit(
        out,
        {"kind": "search", "fingerprint": print_, **described, "facts": facts},
        {"seconds": journal.spent + time.time() - begin},
    )
    shutil.rmtree(work, ignore_errors=True)
    SearchControl(where.run).clear()
    _drop_leftovers(experiment, where, list(journal.records.values()))
    return artifact


def _drop_leftovers(experiment: Experiment, where: RunContext, records: list[JournalRecord]) -> None:
    """Stopped trials leave checkpoints behind that nobody goes on from once the search is over."""
    for record in records:
        if record.ended is not None and record.ended["state"] != "stopped":
            continue
        stages = trial_experiment(experiment, record.begun.overrides)
        for name, (print_, _, _) in fingerprints(stages, where.folder).items():
            kind = stages.stages[name].kind
            with suppress(LeaseHeld), where.store.lease(kind, print_):  # another run may be at it
                shutil.rmtree(where.store.work(kind, print_), ignore_errors=True)


def _run(
    experiment: Experiment,
    where: RunContext,
    log: EventLog,
    room: Capacity,
    longest: float,
    work: Path,
    journal: Journal,
) -> str:
    """All trials; returns what ended the search before its last one, "" where nothing did.

    A new Tuner also when an earlier try was cut off: Tuner.restore of Ray 2.60 forgets ASHA's rungs, and falls back to
    a single trial without values when its state was cut off in the writing. The journal knows what was drawn and how it
    ended, and of unfinished trials the store has finished stages whole and others from their checkpoints.
    """
    from ray import tune

    from tunery.search.budget import BudgetStopper
    from tunery.search.pbt_scheduler import PbtScheduler
    from tunery.search.progress import JournalCallback
    from tunery.search.queue import Queue
    from tunery.search.schedulers import scheduler_of
    from tunery.training.packed.pack_server import get_pack_scheduler

    os.environ.update(QUIET)
    shutil.rmtree(work / "tune", ignore_errors=True)
    search = experiment.search
    assert search is not None, "checked by run_search"
    compute = experiment.compute
    reasons = _why_not_packed(experiment)
    size = _packed_by(experiment, reasons)
    desk = get_pack_scheduler(room.workers, size, compute) if size > 1 else None
    # A trial runs in a folder of Tune's: a relative path would lead nowhere there.
    kept = work / "kept" if search.scheduler == "pbt" else None
    function = TrialFunction(experiment, dataclasses.replace(where, file=where.file.absolute()), desk, kept)
    steering = SearchControl(where.run)
    if not journal.records:
        steering.forget_stops()
    scheduler: Any
    population = None
    if kept is not None:
        population = _population(experiment, journal, steering)
        scheduler = PbtScheduler(population, steering, kept, in_turn=search.trials > room.workers * size)
    else:
        scheduler = scheduler_of(search, longest, journal)
    assert compute.workers_per_trial != "auto", "resolved before a search"
    held = compute.workers_per_trial * (1 if compute.device == "gpu" else compute.cpus_per_worker)
    enough = BudgetStopper(search, journal, room.workers * held)
    queue = Queue(
        search,
        journal,
        suggester(search, experiment.seed, work, earlier_trials(search, where.store)),
        steering,
        _at_once(room, size, search),
        partial(with_seed, experiment),
        partial(_tell_untold, log, journal, search),
        population,
        partial(_unfit, experiment),
    )
    tuner = tune.Tuner(
        tune.with_resources(function.__call__, partial(_resources, function, compute)),
        param_space={},
        tune_config=tune.TuneConfig(
            num_samples=-1,
            max_concurrent_trials=_at_once(room, size, search),
            search_alg=queue,
            scheduler=scheduler,
            # Tune keeps a process and its device for a next trial of its kind: packs would wait for the device forever.
            reuse_actors=compute.workers_per_trial == 1 and not (desk is not None and any(reasons)),
            trial_name_creator=lambda trial: trial.config["trial"],
            trial_dirname_creator=lambda trial: f"{trial.config['trial']}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(work),
            verbose=0,
            stop=enough,
            callbacks=[JournalCallback(log, journal, search, where)],
            failure_config=tune.FailureConfig(max_failures=1),
        ),
    )
    interruptible(tuner.fit)
    # Tune (2.60) tells no callback of the trials that a Stopper ends; else there are none left.
    for begun in journal.open:
        journal.stop(begun.trial, search.metrics)
        _tell_untold(log, journal, search, begun)
    return enough.reason


def _population(experiment: Experiment, journal: Journal, steering: SearchControl) -> Population:
    """As an earlier try left it: what it had decided is decided again."""
    stage = curve_stage(experiment)
    assert experiment.search is not None, "checked by run_search"
    assert stage is not None, "checked by spec/check_search.py"
    training: Any = experiment.stages[stage]
    population = Population(experiment.search, stage, training.evaluations, experiment.seed)
    population.replay(journal.records.values())
    for member in population.leaving:
        steering.stop(member)
    population.leaving.clear()
    return population


def _tell_untold(log: EventLog, journal: Journal, search: Search, begun: TrialStart) -> None:
    outcome = journal.records[begun.trial].ended or {}
    value = value_of(search, outcome["values"]) if outcome["values"] else None
    told = {"overrides": begun.overrides, "origin": begun.origin, "of": begun.of}
    log.write("trial_finished", trial=begun.trial, **told, **outcome, value=value)


def _unfit(experiment: Experiment, overrides: dict[str, Any]) -> str:
    try:
        trial_experiment(experiment, overrides)
    except ValueError as error:  # pydantic's and PathError are such
        return f"these values don't fit the experiment any more: {error}"
    return ""


def _resources(function: TrialFunction, compute: Any, config: dict[str, Any]) -> Any:
    """Of a trial's driver. Where others do the work (a pack, Ray Train's workers), it must hold none of theirs: a
    hundredth of a CPU would keep the last worker out. A byte of memory, because Tune (2.60) refuses a trial without any
    resource."""
    from ray.tune import PlacementGroupFactory

    alone = compute.workers_per_trial == 1 and function.alone(config["overrides"])
    if not alone:
        return PlacementGroupFactory([{"CPU": 0, "memory": 1}])
    gpu = {"GPU": 1.0} if compute.device == "gpu" else {}
    return PlacementGroupFactory([{"CPU": float(compute.cpus_per_worker), **gpu}])
