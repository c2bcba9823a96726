"""Execute the stages of an experiment one at a time, each under its lease. Stages whose artifact is in the store are
skipped."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from tunery.errors import StageError, Stopped, TuneryError
from tunery.events.event_log import EventLog
from tunery.interrupt import STOP
from tunery.pipeline.cache_keys import CacheKey, cache_keys, stage_seed
from tunery.pipeline.diagnose import diagnose
from tunery.pipeline.run_context import RunContext
from tunery.pipeline.validate_models import validate_models_at_start
from tunery.spec import STAGE_KINDS, Experiment
from tunery.spec.graph import order
from tunery.spec.plugins import load_object
from tunery.store import Artifact, Launcher, StageContext, StageResult, new_output_dir
from tunery.training.launch import InProcessLauncher


@dataclass(frozen=True)
class TrialContext:
    """A trial of a search."""

    id: str = ""
    """Empty for the file's own stages."""
    label: str = ""
    """Suffix for the names of stages in the event log, if the same stages also run with other values."""


def execute(
    experiment: Experiment,
    run_context: RunContext,
    log: EventLog,
    launcher_of: Callable[[str], Launcher] = lambda stage: InProcessLauncher(),
    trial: TrialContext = TrialContext(),
    done: Mapping[str, Artifact] = MappingProxyType({}),
) -> dict[str, Artifact]:
    """Run all stages of `experiment`, whose compute is resolved, except those in `done`. Returns all artifacts by stage
    name. `launcher_of(stage name)` returns where the stage's training and model tasks run (training/launch.py): on the
    workers of a run; in the process of a trial, in a pack of LoRA trials, or on the trial's own workers. The default
    suits stages without models.

    Ray must be running if a stage that needs it is not in the store. Raises StageError after a stage_failed event.
    """
    keys = cache_keys(experiment, run_context.folder)
    artifacts = dict(done)
    for name in order(experiment.stages):
        if name in done:
            continue
        STOP.check()
        stage = experiment.stages[name]
        artifact = run_context.store.find(stage.kind, keys[name].fingerprint)
        if artifact is None:
            artifact = _run_stage(name, experiment, run_context, log, launcher_of(name), trial, keys[name], artifacts)
        elif not trial.label:
            _log_finished(log, name, artifact, reused=True, seconds=0.0)
        artifacts[name] = artifact
    return artifacts


def _run_stage(
    name: str,
    experiment: Experiment,
    run_context: RunContext,
    log: EventLog,
    launcher: Launcher,
    trial: TrialContext,
    key: CacheKey,
    artifacts: Mapping[str, Artifact],
) -> Artifact:
    stage = experiment.stages[name]
    started = time.time()

    def emit(event: str, **values: Any) -> None:
        log.write(event, **{"stage": name + trial.label, **values})

    def waiting(message: str) -> None:
        emit("progress", done=0, total=None, unit="", detail=message)

    def wait(holder: str) -> None:
        launcher.release()  # the other run may need the workers' CPUs or GPUs to build it
        waiting(f"waiting: {holder} is building it")

    emit("stage_started", kind=stage.kind, fingerprint=key.fingerprint, detail="")
    try:
        with run_context.store.lease(stage.kind, key.fingerprint, wait) as lease:
            artifact = run_context.store.find(stage.kind, key.fingerprint)
            if artifact is not None:  # another run built it while this one waited for the lease
                _log_finished(log, name + trial.label, artifact, reused=True, seconds=time.time() - started)
                return artifact
            validate_models_at_start(name, stage, experiment, run_context.folder)
            staging_dir = run_context.store.staging_dir(stage.kind, key.fingerprint)
            out = new_output_dir(staging_dir, lease)
            context = StageContext(
                name=name,
                trial=trial.id,
                spec=stage,
                inputs={item.stage: artifacts[item.stage] for item in stage.inputs()},
                seed=stage_seed(stage, experiment),
                folder=run_context.folder,
                out=out,
                staging_dir=staging_dir,
                store=run_context.store.root,
                scores=run_context.store.scores,
                events=run_context.events,
                logs=run_context.logs,
                compute=experiment.compute,
                launcher=launcher.with_waiting(waiting),
                emit=emit,
                identity=key.identity,
                command=run_context.command,
            )
            run_stage: Callable[[StageContext], StageResult] = load_object(STAGE_KINDS[stage.kind].run)
            result = run_stage(context)
            seconds = time.time() - started
            artifact = run_context.store.commit(
                out,
                {"kind": stage.kind, **asdict(key), "facts": result.facts},
                {**result.runtime_stats, "seconds": seconds},
                lease,
            )
            shutil.rmtree(staging_dir, ignore_errors=True)
    except Stopped:
        raise
    except Exception as error:
        if STOP.requested:  # a signal to the process group also kills workers
            raise KeyboardInterrupt from error
        diagnosis = diagnose(error, name, run_context, trial.id)
        if isinstance(diagnosis, Stopped):  # wrapped by Ray Train if there are several workers
            raise diagnosis from error
        with suppress(OSError):  # on a full disk the error must still be raised
            fields = {"message": diagnosis.message, "cause": diagnosis.cause, "remedy": diagnosis.remedy}
            emit("stage_failed", kind=stage.kind, **fields, log=_log_file(diagnosis))
        raise diagnosis from error
    _log_finished(log, name + trial.label, artifact, reused=False, seconds=seconds)
    return artifact


def _log_finished(log: EventLog, name: str, artifact: Artifact, *, reused: bool, seconds: float) -> None:
    """Log the facts of an artifact. For a reused artifact log its metrics too, so that every run's log is complete."""
    if reused and (artifact.path / "history.jsonl").is_file():
        for line in (artifact.path / "history.jsonl").read_text().splitlines():
            point = json.loads(line)
            step = point.pop("step")
            log.write("metrics", stage=name, step=int(step), values=point)
    log.write(
        "stage_finished",
        stage=name,
        kind=artifact.kind,
        fingerprint=artifact.fingerprint,
        reused=reused,
        seconds=seconds,
        artifact=str(artifact.path),
        facts=artifact.facts,
    )


def _log_file(error: TuneryError) -> str:
    return error.log if isinstance(error, StageError) else ""
