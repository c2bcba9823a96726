"""One run of an experiment: its stages, its search, the best trial measured, and the comparison that it ends with."""

from __future__ import annotations

import itertools
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tunery
from tunery.errors import Interrupted
from tunery.events.event_log import EventLog, read_events
from tunery.events.overhead import overhead
from tunery.interrupt import STOP
from tunery.pipeline.cache_keys import fingerprints
from tunery.pipeline.compute import batch_sizes, concurrent_trials, local_hardware, resolve_compute
from tunery.pipeline.diagnose import RUN, diagnose
from tunery.pipeline.execute import RunContext, TrialContext, execute
from tunery.pipeline.plan import CHARACTERS_PER_TOKEN, Plan, characters_of, make_plan
from tunery.pipeline.ray_address import cluster_address
from tunery.pipeline.ray_session import RaySession
from tunery.pipeline.validate import validate
from tunery.reporting.summary_tables import (
    classifier_table,
    diversity_table,
    filter_table,
    loss_table,
    policy_table,
    review_table,
    reward_table,
    search_table,
    win_table,
)
from tunery.search.population import most_descendants
from tunery.search.search_plan import plan_search
from tunery.search.space import before_selection, curve_stage, longest, metric_stages
from tunery.spec import Evaluate, Experiment, ReviewLabels, Training, WinRate
from tunery.spec.graph import inputs_of, with_upstream
from tunery.spec.overrides import with_overrides
from tunery.spec.yaml_source import YamlSource
from tunery.store import Artifact, Store
from tunery.store.rows import read_rows

SAMPLE = 1000
"""Rows whose length stands for that of all."""
TOKENS_OF_A_DECISION = 200.0


@dataclass(frozen=True)
class Outcome:
    artifacts: dict[str, Artifact]
    search: Artifact | None


def check_all(experiment: Experiment, source: YamlSource, store: Store) -> Experiment:
    """Everything that can be known before Ray starts; returns the experiment with `compute` resolved for here.

    Raises SpecErrors, StoreError or RequestError; nothing is written.
    """
    # A cluster's size is known only to the cluster: there the workers are checked once Ray is connected.
    if cluster_address() is not None:
        auto = experiment.compute
        workers = 1 if auto.workers == "auto" else auto.workers
        per_trial = 1 if auto.workers_per_trial == "auto" else auto.workers_per_trial
        validate(experiment, source, store, workers, per_trial)
        return experiment
    compute, _ = resolve_compute(experiment.compute, local_hardware(), batch_sizes(experiment))
    assert compute.workers != "auto", "resolved"
    assert compute.workers_per_trial != "auto", "resolved"
    validate(experiment, source, store, compute.workers, compute.workers_per_trial)
    return experiment.model_copy(update={"compute": compute})


def plan_experiment(experiment: Experiment, source: YamlSource, store: Store) -> Plan:
    """What a run would do. Raises RequestError when its workers can't be placed on this machine."""
    lines: list[str] = []
    if (search := experiment.search) is not None:
        compute, _ = resolve_compute(experiment.compute, local_hardware(), batch_sizes(experiment))
        resolved = experiment.model_copy(update={"compute": compute})
        workers, why = concurrent_trials(compute, local_hardware())
        planned = plan_search(resolved, store, Path(source.file).parent, workers, why)
        by = f", {search.scheduler} by {'evaluations' if search.scheduler == 'pbt' else search.progress_unit}"
        stopped = by if search.scheduler != "none" else ""
        lines = [f"{planned.trials} trials ({search.algorithm}{stopped}) for {search.metric}", *planned.lines()]
        if search.scheduler == "pbt":
            lines.append(f"then up to {most_descendants(resolved)} that go on from a better one's checkpoint")
        if search.num_seeds > 1:
            more = search.num_seeds - 1
            lines.append(f"then the {min(search.replicate_top_k, planned.trials)} best with {more} more seeds each")
    return make_plan(experiment, source, store, lines)


def run_experiment(experiment: Experiment, source: YamlSource, store: Store, session: RaySession) -> Outcome:
    """Everything in the file. The run's event log tells all of it; raises the first error, after telling it."""
    where = RunContext(store, store.run(experiment.name), Path(source.file))
    log = EventLog(where.events / "driver.jsonl")
    begin = time.time()
    try:
        with STOP.released():
            log.write(
                "run_started",
                run=experiment.name,
                file=source.file,
                text=source.text,
                stages=[
                    {"name": name, "kind": stage.kind, "inputs": list(inputs_of(stage))}
                    for name, stage in experiment.stages.items()
                ],
                versions=_versions(),
                command="tunery " + " ".join(sys.argv[1:]),
            )
            outcome = _run(experiment, source, where, log, session)
            log.write("run_finished", state="done", seconds=time.time() - begin, message="")
    except KeyboardInterrupt:
        raise _interrupted(log, begin) from None
    except Exception as error:
        if STOP.requested:  # the signal went to the whole process group, and ended a worker before it came here
            raise _interrupted(log, begin) from error
        told = diagnose(error, RUN, where)
        with suppress(OSError):  # on a full disk the error matters more than its place in the log
            log.write("run_finished", state="failed", seconds=time.time() - begin, message=str(told))
        raise told from error
    return outcome


def _interrupted(log: EventLog, begin: float) -> Interrupted:
    message = "stopped; the same command goes on from the last finished stage or checkpoint"
    with suppress(OSError):
        log.write("run_finished", state="interrupted", seconds=time.time() - begin, message=message)
    return Interrupted(message)


def _run(experiment: Experiment, source: YamlSource, where: RunContext, log: EventLog, session: RaySession) -> Outcome:
    if _needs_ray(experiment, where):
        hardware = session.start(experiment.compute)
        compute, _ = resolve_compute(experiment.compute, hardware, batch_sizes(experiment))
        assert compute.workers != "auto", "resolved"
        assert compute.workers_per_trial != "auto", "resolved"
        validate(experiment, source, where.store, compute.workers, compute.workers_per_trial)
        experiment = experiment.model_copy(update={"compute": compute})
    found: Artifact | None = None
    best: dict[str, Artifact] = {}
    made = execute(before_search(experiment), where, log)
    if experiment.search is not None:
        from tunery.search.tune import Capacity, run_search

        room = Capacity(*concurrent_trials(experiment.compute, session.hardware)) if session.hardware else None
        found = run_search(experiment, where, log, room, longest(experiment, *_rows_of(experiment, made)))
        made = execute(experiment, where, log, made=made)
        best = _evaluate_best_trial(experiment, where, log, found)
    for table in (
        filter_table(experiment, made),
        diversity_table(experiment, made),
        review_table(experiment, made),
        classifier_table(experiment, made),
        reward_table(experiment, made),
        policy_table(experiment, made),
        loss_table(experiment, made, best),
        win_table(experiment, made, best),
        search_table(experiment, found),
    ):
        if table is not None:
            log.write("comparison", **table)
    log.write("overhead", **overhead(read_events(where.events)))
    return Outcome(made, found)


def before_search(experiment: Experiment) -> Experiment:
    """Without the trainings that the search changes, and what depends on those: with the file's own values they come
    after it, for the comparison. Where one of the trials had these values, they are there then."""
    if experiment.search is None:
        return experiment
    stages = experiment.stages
    searched = {path.split(".")[0] for path in experiment.search.space}
    trained = {
        name
        for name, stage in stages.items()
        if isinstance(stage, Training) and searched & with_upstream(stages, [name]).keys()
    }
    kept = {name: stage for name, stage in stages.items() if not trained & with_upstream(stages, [name]).keys()}
    return experiment.model_copy(update={"stages": kept})


def _needs_ray(experiment: Experiment, where: RunContext) -> bool:
    from tunery.pipeline.stage_registry import STAGES
    from tunery.search.tune import search_fingerprint

    stages = experiment.stages
    missing = [
        name
        for name, (print_, _, _) in fingerprints(experiment, where.folder).items()
        if where.store.find(stages[name].kind, print_) is None
    ]
    if any(STAGES[stages[name].kind].needs_ray for name in missing):
        return True
    if experiment.search is None:
        return False
    found = where.store.find("search", search_fingerprint(experiment, where)[0])
    if found is None:
        return True
    best = _best_experiment(experiment, found)
    return any(
        where.store.find(best.stages[name].kind, print_) is None
        for name, (print_, _, _) in fingerprints(best, where.folder).items()
    )


def _rows_of(experiment: Experiment, made: dict[str, Artifact]) -> tuple[int, float]:
    """Rows that the searched training could see at most, those before any selection, and about how many tokens each
    has."""
    name = curve_stage(experiment)
    if name is None:
        return 0, 0.0
    stage = experiment.stages[name]
    assert isinstance(stage, Training), "a curve belongs to a training"
    if isinstance(stage.data, ReviewLabels) and stage.data.review in made:
        return int(made[stage.data.review].facts["decided"]), TOKENS_OF_A_DECISION
    rows, characters = 0, 0.0
    for data in before_selection(experiment, name):
        if data not in made:  # each trial has others
            continue
        here = int(made[data].facts["rows"])
        sample = list(itertools.islice(read_rows(made[data].path, ["text", "messages"]), SAMPLE))
        rows += here
        characters += here * sum(map(characters_of, sample)) / max(1, len(sample))
    return rows, characters / max(1, rows) / CHARACTERS_PER_TOKEN


def _best_experiment(experiment: Experiment, found: Artifact) -> Experiment:
    """The evaluate and win_rate stages that depend on what was searched, with the best trial's values."""
    assert experiment.search is not None, "there was a search"
    best = with_overrides(experiment, found.facts["best"]["overrides"])
    searched = {path.split(".")[0] for path in experiment.search.space}
    wanted = [
        name
        for name, stage in best.stages.items()
        if isinstance(stage, Evaluate | WinRate) and searched & with_upstream(best.stages, [name]).keys()
    ] or metric_stages(experiment.search)
    return best.model_copy(update={"stages": with_upstream(best.stages, wanted), "search": None})


def _evaluate_best_trial(
    experiment: Experiment, where: RunContext, log: EventLog, found: Artifact
) -> dict[str, Artifact]:
    """The best trial's model on the sets of evaluate and win_rate stages; what the trials made is not made again."""
    best = _best_experiment(experiment, found)
    return execute(best, where, log, TrialContext(label=" (best trial)"))


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    names = ("ray", "torch", "transformers", "trl", "peft", "deepspeed", "wandb")
    versions = {"tunery": tunery.__version__, "python": sys.version.split()[0]}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"
    return versions
