"""Making stages: one at a time, each under its lease, skipped when its artifact is there."""

from __future__ import annotations

import json
import shlex
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from tunery.errors import StageError, Stopped, TuneryError
from tunery.events.event_log import EventLog
from tunery.interrupt import STOP
from tunery.pipeline.cache_keys import fingerprints, stage_seed
from tunery.pipeline.diagnose import diagnose
from tunery.pipeline.stage_registry import STAGES
from tunery.pipeline.validate_models import validate_models_at_start
from tunery.spec import Experiment
from tunery.spec.graph import order
from tunery.store import DEFAULT_STORE, Artifact, StageContext, Store


@dataclass(frozen=True)
class RunContext:
    """Where a run happens; the same for the stages of the file and for those of its trials."""

    store: Store
    run: Path
    """The run's folder."""
    file: Path
    """The experiment's."""

    @property
    def folder(self) -> Path:
        """Where relative paths in the experiment's file start."""
        return self.file.parent

    def command(self, verb: str, *words: str) -> str:
        """The command line that does `verb` with this experiment and store, for a message that says what to do."""
        default = self.store.root == DEFAULT_STORE.absolute()
        store = () if default else ("--store", str(self.store.root))
        return shlex.join(("tunery", verb, str(self.file), *words, *store))

    @property
    def events(self) -> Path:
        return self.run / "events"

    @property
    def logs(self) -> Path:
        return self.run / "logs"


@dataclass(frozen=True)
class TrialContext:
    """How a trial's stages differ from those of the file: trained in the trial's own process, and heard by Tune."""

    id: str = ""
    label: str = ""
    """Added to the names of stages in the event log, where the same stages ran before with other values."""
    in_process: bool = False
    desk: Any = None
    """Where its trainings take a seat in a pack (training/packed/pack_server.py)."""
    stop: Path | None = None
    """A file whose presence ends it."""
    shares: str = ""
    """The training that shares checkpoints with those of other trials:"""
    kept: Path | None = None
    begins_with: Path | None = None
    """both as its job has them (training/job.py)."""
    report: Callable[[str, dict[str, float]], None] = lambda stage, metrics: None
    callbacks: Callable[[str], tuple[Any, ...]] = field(default=lambda stage: ())


def execute(
    experiment: Experiment,
    where: RunContext,
    log: EventLog,
    trial: TrialContext | None = None,
    made: Mapping[str, Artifact] = MappingProxyType({}),
) -> dict[str, Artifact]:
    """Make every stage of `experiment` (whose compute is resolved) but those in `made`; returns all artifacts by stage
    name.

    Ray must have been started when a stage is missing that needs it. Raises StageError, after a stage_failed event.
    """
    trial = trial or TrialContext()
    known = fingerprints(experiment, where.folder)
    artifacts = dict(made)
    for name in order(experiment.stages):
        if name in made:
            continue
        STOP.check()
        stage = experiment.stages[name]
        print_, own, inputs = known[name]
        artifact = where.store.find(stage.kind, print_)
        if artifact is None:
            described = {"identity": own, "inputs": inputs}
            artifact = _make(name, experiment, where, log, trial, print_, described, artifacts)
        elif not trial.label:
            _tell_finished(log, name, artifact, reused=True, seconds=0.0)
        artifacts[name] = artifact
    return artifacts


def _make(
    name: str,
    experiment: Experiment,
    where: RunContext,
    log: EventLog,
    trial: TrialContext,
    print_: str,
    described: Mapping[str, Any],
    made: Mapping[str, Artifact],
) -> Artifact:
    stage = experiment.stages[name]
    started = time.time()

    def emit(event: str, **values: Any) -> None:
        log.write(event, **{"stage": name + trial.label, **values})

    def waiting(holder: str) -> None:
        emit("progress", done=0, total=None, unit="", detail=f"waiting: {holder} makes it")

    emit("stage_started", kind=stage.kind, fingerprint=print_, detail="")
    try:
        with where.store.lease(stage.kind, print_, waiting):
            if (artifact := where.store.find(stage.kind, print_)) is not None:  # made while we waited
                _tell_finished(log, name + trial.label, artifact, reused=True, seconds=time.time() - started)
                return artifact
            validate_models_at_start(name, stage, experiment, where.folder)
            work = where.store.work(stage.kind, print_)
            out = work / "out"
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            context = StageContext(
                name=name,
                trial=trial.id,
                spec=stage,
                inputs={item.stage: made[item.stage] for item in stage.inputs()},
                seed=stage_seed(stage, experiment),
                folder=where.folder,
                out=out,
                work=work,
                store=where.store.root,
                scores=where.store.scores,
                events=where.events,
                logs=where.logs,
                compute=experiment.compute,
                emit=emit,
                identity=described["identity"],
                command=where.command,
                in_process=trial.in_process,
                desk=trial.desk,
                stop=trial.stop,
                kept=trial.kept if name == trial.shares else None,
                begins_with=trial.begins_with if name == trial.shares else None,
                report=lambda metrics: trial.report(name, metrics),
                callbacks=trial.callbacks(name),
            )
            result = STAGES[stage.kind].load()(context)
            seconds = time.time() - started
            artifact = where.store.commit(
                out,
                {"kind": stage.kind, "fingerprint": print_, **described, "facts": result.facts},
                {**result.measured, "seconds": seconds},
            )
            shutil.rmtree(work, ignore_errors=True)
    except Stopped:
        raise
    except Exception as error:
        if STOP.requested:  # a signal to the whole process group ends workers too
            raise KeyboardInterrupt from error
        told = diagnose(error, name, where, trial.id)
        if isinstance(told, Stopped):  # as Ray Train hands it on from several workers
            raise told from error
        with suppress(OSError):  # on a full disk the error matters more than its place in the log
            story = {"message": told.message, "cause": told.cause, "remedy": told.remedy, "log": _log(told)}
            emit("stage_failed", kind=stage.kind, **story)
        raise told from error
    _tell_finished(log, name + trial.label, artifact, reused=False, seconds=seconds)
    return artifact


def _tell_finished(log: EventLog, name: str, artifact: Artifact, *, reused: bool, seconds: float) -> None:
    """A reused artifact tells its facts and its curve again, so that a run's log is whole by itself."""
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


def _log(error: TuneryError) -> str:
    return error.log if isinstance(error, StageError) else ""
