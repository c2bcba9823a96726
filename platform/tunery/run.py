"""Run an experiment: its stages, its search, the evaluation of the best trial, and the summary tables."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import tunery
from tunery.errors import Interrupted
from tunery.events.event_log import EventLog, read_events
from tunery.events.overhead import overhead
from tunery.interrupt import STOP
from tunery.pipeline.cache_keys import fingerprints
from tunery.pipeline.compute import Hardware, batch_sizes, concurrent_trials, local_hardware, resolve_compute
from tunery.pipeline.diagnose import RUN, diagnose
from tunery.pipeline.execute import TrialContext, execute
from tunery.pipeline.plan import CHARACTERS_PER_TOKEN, Plan, characters_of, make_plan
from tunery.pipeline.ray_address import cluster_address
from tunery.pipeline.ray_session import RaySession
from tunery.pipeline.run_context import RunContext
from tunery.pipeline.validate import validate
from tunery.reporting.summary_tables import summary_tables
from tunery.search.population import max_children
from tunery.search.search_plan import plan_search
from tunery.search.space import curve_stage, estimate_max_progress, metric_stages, unfiltered_stages
from tunery.spec import STAGE_KINDS, TRAINERS, Experiment, ReviewLabels, Training
from tunery.spec.graph import inputs_of, with_upstream
from tunery.spec.overrides import with_overrides
from tunery.spec.yaml_source import YamlSource
from tunery.store import Artifact, Launcher, Store
from tunery.store.rows import read_rows
from tunery.training.launch import WorkersLauncher

SAMPLE_SIZE = 1000
"""Number of rows that the mean row length is estimated from."""
TOKENS_PER_REVIEWED_ROW = 200.0


@dataclass(frozen=True)
class Outcome:
    artifacts: dict[str, Artifact]
    search: Artifact | None


def validate_experiment(
    experiment: Experiment, source: YamlSource, store: Store, hardware: Hardware | None = None
) -> Experiment:
    """Validate everything that can be checked before Ray starts. Returns the experiment with `compute` resolved for
    `hardware`, this machine when not given.

    Writes nothing. Raises SpecErrors, StoreError or RequestError.
    """
    # The size of a cluster is known only once Ray is connected: the workers are validated again then.
    if hardware is None and cluster_address() is not None:
        auto = experiment.compute
        workers = 1 if auto.workers == "auto" else auto.workers
        per_trial = 1 if auto.workers_per_trial == "auto" else auto.workers_per_trial
        validate(experiment, source, store, workers, per_trial)
        return experiment
    compute, _ = resolve_compute(experiment.compute, hardware or local_hardware(), batch_sizes(experiment))
    assert compute.workers != "auto", "resolved"
    assert compute.workers_per_trial != "auto", "resolved"
    validate(experiment, source, store, compute.workers, compute.workers_per_trial)
    return experiment.model_copy(update={"compute": compute})


def plan_experiment(experiment: Experiment, source: YamlSource, store: Store, hardware: Hardware | None = None) -> Plan:
    """Return the plan of a run on `hardware`, this machine when not given. Raises RequestError if its workers do not
    fit."""
    hardware = hardware or local_hardware()
    lines: list[str] = []
    if (search := experiment.search) is not None:
        compute, _ = resolve_compute(experiment.compute, hardware, batch_sizes(experiment))
        resolved = experiment.model_copy(update={"compute": compute})
        workers, reason = concurrent_trials(compute, hardware)
        planned = plan_search(resolved, store, Path(source.file).parent, workers, reason)
        by = f", {search.scheduler} by {'evaluations' if search.scheduler == 'pbt' else search.progress_unit}"
        scheduler = by if search.scheduler != "none" else ""
        lines = [f"{planned.trials} trials ({search.algorithm}{scheduler}) for {search.metric}", *planned.lines()]
        if search.scheduler == "pbt":
            lines.append(f"then up to {max_children(resolved)} copies that start from the checkpoint of a better trial")
        if search.num_seeds > 1:
            seeds = search.num_seeds - 1
            lines.append(f"then the best {min(search.replicate_top_k, planned.trials)} with {seeds} more seeds each")
    return make_plan(experiment, source, store, lines, hardware)


def run_experiment(experiment: Experiment, source: YamlSource, store: Store, session: RaySession) -> Outcome:
    """Run the experiment and write its event log. An error is logged before it is raised."""
    run_context = RunContext(store, store.run(experiment.name), Path(source.file))
    log = EventLog(run_context.events / "driver.jsonl")
    start_time = time.time()
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
            outcome = _run(experiment, source, run_context, log, session)
            log.write("run_finished", state="done", seconds=time.time() - start_time, message="")
    except KeyboardInterrupt:
        raise _interrupted(log, start_time) from None
    except Exception as error:
        if STOP.requested:  # the signal reached a worker of the process group first
            raise _interrupted(log, start_time) from error
        diagnosis = diagnose(error, RUN, run_context)
        with suppress(OSError):  # on a full disk the error must still be raised
            log.write("run_finished", state="failed", seconds=time.time() - start_time, message=str(diagnosis))
        raise diagnosis from error
    return outcome


def _interrupted(log: EventLog, start_time: float) -> Interrupted:
    message = "stopped; the same command resumes from the last finished stage or checkpoint"
    with suppress(OSError):
        log.write("run_finished", state="interrupted", seconds=time.time() - start_time, message=message)
    return Interrupted(message)


def _run(
    experiment: Experiment, source: YamlSource, run_context: RunContext, log: EventLog, session: RaySession
) -> Outcome:
    if _needs_ray(experiment, run_context):
        hardware = session.start(experiment.compute)
        compute, _ = resolve_compute(experiment.compute, hardware, batch_sizes(experiment))
        assert compute.workers != "auto", "resolved"
        assert compute.workers_per_trial != "auto", "resolved"
        validate(experiment, source, run_context.store, compute.workers, compute.workers_per_trial)
        experiment = experiment.model_copy(update={"compute": compute})
    search_artifact: Artifact | None = None
    best: dict[str, Artifact] = {}

    def launcher(stage: str) -> Launcher:
        return WorkersLauncher(session.workers, experiment.compute)

    first_stages = before_search(experiment)
    if session.hardware is not None and (modules := _modules_of_missing_stages(first_stages, run_context)):
        session.workers.group(experiment.compute, modules)  # imports them while the first stages work
    artifacts = execute(first_stages, run_context, log, launcher)
    if experiment.search is not None:
        from tunery.search.tune import Capacity, run_search

        capacity = Capacity(*concurrent_trials(experiment.compute, session.hardware)) if session.hardware else None
        max_progress = estimate_max_progress(experiment, *_training_size(experiment, artifacts))
        session.workers.close()  # trials need their resources
        search_artifact = run_search(experiment, run_context, log, capacity, max_progress)
        artifacts = execute(experiment, run_context, log, launcher, done=artifacts)
        best = _evaluate_best_trial(experiment, run_context, log, launcher, search_artifact)
    for table in summary_tables(experiment, artifacts, best, search_artifact):
        log.write("comparison", **table)
    log.write("overhead", **overhead(read_events(run_context.events)))
    return Outcome(artifacts, search_artifact)


def before_search(experiment: Experiment) -> Experiment:
    """Return the experiment without the trainings that the search changes and the stages that depend on them. With the
    file's own values these run after the search, for the summary tables; a trial with the same values caches them."""
    if experiment.search is None:
        return experiment
    stages = experiment.stages
    searched = {path.split(".")[0] for path in experiment.search.space}
    trained = {
        name
        for name, stage in stages.items()
        if isinstance(stage, Training) and searched & with_upstream(stages, [name]).keys()
    }
    remaining = {name: stage for name, stage in stages.items() if not trained & with_upstream(stages, [name]).keys()}
    return experiment.model_copy(update={"stages": remaining})


def _needs_ray(experiment: Experiment, run_context: RunContext) -> bool:
    from tunery.search.tune import search_fingerprint

    stages = experiment.stages
    if any(STAGE_KINDS[stages[name].kind].needs_ray for name in _missing_stages(experiment, run_context)):
        return True
    if experiment.search is None:
        return False
    search_artifact = run_context.store.find("search", search_fingerprint(experiment, run_context)[0])
    if search_artifact is None:
        return True
    return bool(_missing_stages(_best_experiment(experiment, search_artifact), run_context))


def _modules_of_missing_stages(experiment: Experiment, run_context: RunContext) -> list[str]:
    """Return the modules that train the models of stages that are not in the store."""
    missing = {experiment.stages[name].kind for name in _missing_stages(experiment, run_context)}
    return sorted({TRAINERS[kind].trainer.split(":")[0] for kind in missing & TRAINERS.keys()} - {""})


def _missing_stages(experiment: Experiment, run_context: RunContext) -> list[str]:
    """Return the stages that are not in the store."""
    return [
        name
        for name, cache_key in fingerprints(experiment, run_context.folder).items()
        if run_context.store.find(experiment.stages[name].kind, cache_key) is None
    ]


def _training_size(experiment: Experiment, artifacts: dict[str, Artifact]) -> tuple[int, float]:
    """Return the maximum number of rows that the searched training could read (those before selection) and an estimate
    of the tokens per row."""
    name = curve_stage(experiment)
    if name is None:
        return 0, 0.0
    stage = experiment.stages[name]
    assert isinstance(stage, Training), "a curve stage is a training"
    if isinstance(stage.data, ReviewLabels) and stage.data.review in artifacts:
        return int(artifacts[stage.data.review].facts["decided"]), TOKENS_PER_REVIEWED_ROW
    rows, characters = 0, 0.0
    for data in unfiltered_stages(experiment, name):
        if data not in artifacts:  # differs between trials
            continue
        num_rows = int(artifacts[data].facts["rows"])
        sample = list(itertools.islice(read_rows(artifacts[data].path, ["text", "messages"]), SAMPLE_SIZE))
        rows += num_rows
        characters += num_rows * sum(map(characters_of, sample)) / max(1, len(sample))
    return rows, characters / max(1, rows) / CHARACTERS_PER_TOKEN


def _best_experiment(experiment: Experiment, search_artifact: Artifact) -> Experiment:
    """Return the evaluate and win_rate stages that depend on searched values, with the values of the best trial."""
    assert experiment.search is not None, "called for experiments with a search"
    best = with_overrides(experiment, search_artifact.facts["best"]["overrides"])
    searched = {path.split(".")[0] for path in experiment.search.space}
    names = [
        name
        for name, stage in best.stages.items()
        if stage.output_type == "metrics" and searched & with_upstream(best.stages, [name]).keys()
    ] or metric_stages(experiment.search)
    return best.model_copy(update={"stages": with_upstream(best.stages, names), "search": None})


def _evaluate_best_trial(
    experiment: Experiment,
    run_context: RunContext,
    log: EventLog,
    launcher: Callable[[str], Launcher],
    search_artifact: Artifact,
) -> dict[str, Artifact]:
    """Evaluate the model of the best trial in the evaluate and win_rate stages. Artifacts of the trials are reused."""
    best = _best_experiment(experiment, search_artifact)
    return execute(best, run_context, log, launcher, TrialContext(label=" (best trial)"))


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
