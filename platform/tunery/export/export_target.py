"""Selects the model to export: its run, stage and trial, from the run's event log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tunery.errors import RequestError
from tunery.events.run_state import RunState, StageState, TrialState
from tunery.pipeline.run_record import FILE_VALUES, has_same_results, read_run
from tunery.search.space import metric_stages
from tunery.spec import Experiment, Training, load
from tunery.spec.error_messages import nearest
from tunery.spec.graph import with_upstream
from tunery.spec.overrides import with_overrides
from tunery.store import Artifact, Store


@dataclass(frozen=True)
class ExportTarget:
    """An existing model of a run."""

    state: RunState
    experiment: Experiment
    """With the trial's overrides applied."""
    stage: str
    trial: TrialState | None
    """None if the model was trained with the file's own values."""
    artifact: Artifact
    notes: tuple[str, ...]

    @property
    def is_searched(self) -> bool:
        return is_searched(self.experiment, self.stage)

    @property
    def trained_with(self) -> str:
        """Whose values the model was trained with, as a phrase; empty if the search does not change the model."""
        search = self.state.search
        if self.trial is None:
            return "with the file's own values, not a trial's" if self.is_searched else ""
        best = search is not None and search.finished and self.trial is search.best
        return f"by {self.trial.name}" + (", the best trial" if best else "")


def select_model(run: str, store: Store, stage: str | None = None, trial: str | None = None) -> ExportTarget:
    """Select a model. `run`: a run's name or folder, or its experiment's file. Raises RequestError if there is no such
    model."""
    from_file = load(Path(run))[0] if Path(run).is_file() else None
    record = read_run(run if from_file is None else from_file.name, store)
    folder, state, experiment = record.folder, record.state, record.experiment
    if from_file is not None and not has_same_results(from_file, experiment):
        raise RequestError(
            f"{run} was edited since the run `{from_file.name}`",
            remedy=f"run `tunery run {run}` first, or use the run's name to export the model of the earlier version",
        )
    candidates = _RunModels(state, experiment, (Store(folder.absolute().parent.parent), store))
    name = candidates.stage(stage)
    if trial not in (None, FILE_VALUES):
        return candidates.of_trial(name, trial)
    if trial is None and is_searched(experiment, name):
        return candidates.of_best_trial(name)
    return candidates.of_file(name)


def is_searched(experiment: Experiment, name: str) -> bool:
    """Whether a field that the search varies changes the stage's model."""
    search, upstream = experiment.search, with_upstream(experiment.stages, [name])
    return search is not None and any(path.split(".")[0] in upstream for path in search.space)


@dataclass(frozen=True)
class _RunModels:
    """A run's state, and the stores that may have its artifacts: run and store may have been moved separately."""

    state: RunState
    experiment: Experiment
    stores: tuple[Store, Store]

    def stage(self, name: str | None) -> str:
        """The stage whose model is exported: `name`, or by default the stage of the search's metric, or the last
        training. Raises RequestError if it trains no model."""
        stages = self.experiment.stages
        models = [name for name, stage in stages.items() if isinstance(stage, Training)]
        if name in models:
            return name
        if name is not None:
            kind = f"`{name}` is a {stages[name].kind} stage" if name in stages else ""
            raise RequestError(
                f"no stage `{name}` of `{self.state.run}` trains a model", cause=kind, remedy=nearest(name, models)
            )
        if not models:
            raise RequestError(
                f"the run `{self.state.run}` has no model",
                cause="no stage of its experiment trains one",
                remedy="add a training stage",
            )
        if self.experiment.search is None:
            return models[-1]
        metric = self.experiment.search.metric
        # <training>.<metric>, or <evaluation>.<model>.<set>.<metric>
        evaluated = next((name for name in metric.split(".")[:2] if name in models), None)
        if evaluated is None:
            raise RequestError(
                "the search's metric belongs to no model of this run",
                cause=f"its metric is `{metric}`",
                remedy=f"use --stage with one of: {', '.join(models)}",
            )
        return evaluated

    def of_file(self, name: str, *notes: str) -> ExportTarget:
        """The model trained with the file's own values."""
        stage = self.state.stages.get(name, StageState(name))
        if not stage.artifact:
            failure = f": {stage.error.message}" if stage.error else ""
            raise RequestError(
                f"`{name}` of the run `{self.state.run}` isn't finished",
                cause=f"the run is {self.state.status}, the stage {stage.status}{failure}",
                remedy=f"run `tunery run {self.state.file}` again to resume it",
            )
        artifact = self._artifact(name, self.experiment, stage.fingerprint)
        return ExportTarget(
            self.state, self.experiment, name, None, artifact or self._raise_removed(name, stage.fingerprint), notes
        )

    def of_trial(self, name: str, trial_name: str) -> ExportTarget:
        """The model of the given trial."""
        search = self.state.search
        trials = search.trials if search else {}
        if trial_name not in trials:
            no_search = "it has no search" if self.experiment.search is None else "no trial has started"
            raise RequestError(
                f"the run `{self.state.run}` has no trial `{trial_name}`",
                cause="" if trials else no_search,
                remedy=nearest(trial_name, [*trials, FILE_VALUES]),
            )
        trial = trials[trial_name]
        if target := self._trial_model(trial, name):
            return target
        if trial.status == "done" and not trial.stages:
            self._raise_unknown(trial)
        others = [other.name for other in trials.values() if name in other.stages and other.stages[name].artifact]
        raise RequestError(
            f"{trial_name} has no model `{name}`",
            cause=f"it is {trial.status}" + (f": {trial.error}" if trial.error else ""),
            remedy=f"trials that have one: {', '.join(others) or 'none'}; `--trial {FILE_VALUES}` exports the model "
            "of the file's own values",
        )

    def of_best_trial(self, name: str) -> ExportTarget:
        """The model of the best trial; that of the file's own values if the search's metric does not need the stage."""
        search = self.state.search
        if search is None or not search.finished or search.best is None:
            progress = (
                "it has not started" if search is None else f"{search.count('done')} of {search.total} trials are done"
            )
            raise RequestError(
                f"the search of `{self.state.run}` has no best trial yet",
                cause=progress,
                remedy=f"run `tunery run {self.state.file}` again to resume it; or export another trial's model with "
                f"--trial, or that of the file's own values with `--trial {FILE_VALUES}`",
            )
        if target := self._trial_model(search.best, name):
            return target
        if name in _trial_stages(self.experiment):
            self._raise_unknown(search.best)
        return self.of_file(name, f"no trial trained `{name}`, because the search's metric does not need it")

    def _trial_model(self, trial: TrialState, name: str) -> ExportTarget | None:
        """None if the trial has no such model. Raises RequestError if it was removed from the store."""
        search, experiment = self.state.search, with_overrides(self.experiment, trial.overrides)
        assert search is not None, "a run with trials has a search"
        assert experiment.search is not None, "a run with trials has a search"
        stage = trial.stages.get(name, StageState(name))
        fingerprint = stage.fingerprint if stage.artifact else ""
        if search.finished and trial is search.best:
            fingerprint = search.best_fingerprints.get(name, fingerprint)
        artifact = self._artifact(name, experiment, fingerprint) if fingerprint else None
        if artifact is not None:
            return ExportTarget(self.state, experiment, name, trial, artifact, ())
        # Stages that the metric does not need are built only if the best trial's evaluation needs them.
        if fingerprint and name in _trial_stages(experiment):
            self._raise_removed(name, fingerprint)
        return None

    def _artifact(self, name: str, experiment: Experiment, fingerprint: str) -> Artifact | None:
        artifacts = (store.find(experiment.stages[name].kind, fingerprint) for store in self.stores)
        return next((artifact for artifact in artifacts if artifact is not None), None)

    def _raise_unknown(self, trial: TrialState) -> NoReturn:
        raise RequestError(
            f"the event log of `{self.state.run}` has no artifacts of {trial.name}",
            cause="the run reused the search of another run from the store",
            remedy=f"export it from that run; or, for the best trial, run `tunery run {self.state.file}` again",
        )

    def _raise_removed(self, name: str, fingerprint: str) -> NoReturn:
        kind = self.experiment.stages[name].kind
        raise RequestError(
            f"the model of `{name}` is no longer in the store",
            cause=f"there is no {kind}-{fingerprint} in {self.stores[0].root / 'artifacts'}",
            remedy=f"run `tunery run {self.state.file}` again to rebuild it (for trials: only the best one's); or use "
            "--store with its store",
        )


def _trial_stages(experiment: Experiment) -> dict[str, object]:
    """The stages that every trial runs."""
    assert experiment.search is not None, "the caller checked"
    return dict(with_upstream(experiment.stages, metric_stages(experiment.search)))
