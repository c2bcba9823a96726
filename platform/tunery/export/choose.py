"""Which model is meant: of which run, of which stage, and made with whose values. Known from the run's event log."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from tunery.errors import RequestError
from tunery.events.run_state import RunState, StageState, TrialState
from tunery.pipeline.run_record import OWN, asks_the_same, read_run
from tunery.search.space import metric_stages
from tunery.spec import Experiment, Training, load
from tunery.spec.error_messages import nearest
from tunery.spec.graph import with_upstream
from tunery.spec.overrides import with_overrides
from tunery.store import Artifact, Store


@dataclass(frozen=True)
class ExportTarget:
    """A model that there is."""

    state: RunState
    experiment: Experiment
    """With the values that the model was made with."""
    stage: str
    trial: TrialState | None
    """None: made with the file's own values."""
    artifact: Artifact
    notes: tuple[str, ...]

    @property
    def is_searched(self) -> bool:
        return is_searched(self.experiment, self.stage)

    @property
    def by(self) -> str:
        """In words: whose values the model was made with; empty where there is no choice."""
        search = self.state.search
        if self.trial is None:
            return "with the file's own values, not a trial's" if self.is_searched else ""
        best = search is not None and search.finished and self.trial is search.best
        return f"by {self.trial.name}" + (", the best trial" if best else "")


def choose(run: str, store: Store, stage: str | None = None, trial: str | None = None) -> ExportTarget:
    """`run`: a run's name or folder, or its experiment's file. Raises RequestError where there is no such model."""
    asked = load(Path(run))[0] if Path(run).is_file() else None
    recorded = read_run(run if asked is None else asked.name, store)
    folder, state, experiment = recorded.folder, recorded.state, recorded.experiment
    if asked is not None and not asks_the_same(asked, experiment):
        raise RequestError(
            f"{run} isn't what the run `{asked.name}` has made: it was edited since",
            remedy=f"give `tunery run {run}` first; or give the run's name, to export what it made before",
        )
    of = _Run(state, experiment, (Store(folder.absolute().parent.parent), store))
    name = of.stage(stage)
    if trial not in (None, OWN):
        return of.by_trial(name, trial)
    return of.by_best(name) if trial is None and is_searched(experiment, name) else of.by_file(name)


def is_searched(experiment: Experiment, name: str) -> bool:
    """Whether what the search varies changes the stage's model."""
    search, needed = experiment.search, with_upstream(experiment.stages, [name])
    return search is not None and any(path.split(".")[0] in needed for path in search.space)


@dataclass(frozen=True)
class _Run:
    """What a run has told, and where its artifacts may lie: run and store may have been moved together or apart."""

    state: RunState
    experiment: Experiment
    stores: tuple[Store, Store]

    def stage(self, asked: str | None) -> str:
        """The stage whose model is meant. Raises RequestError where that makes none."""
        stages = self.experiment.stages
        models = [name for name, stage in stages.items() if isinstance(stage, Training)]
        if asked in models:
            return asked
        if asked is not None:
            kind = f"`{asked}` is a {stages[asked].kind} stage" if asked in stages else ""
            raise RequestError(
                f"no stage `{asked}` of `{self.state.run}` makes a model", cause=kind, remedy=nearest(asked, models)
            )
        if not models:
            raise RequestError(
                f"the run `{self.state.run}` has no model",
                cause="no stage of its experiment trains one",
                remedy="add one",
            )
        if self.experiment.search is None:
            return models[-1]
        metric = self.experiment.search.metric
        # <training>.<measure>, or <stage that measures>.<model>.<set>.<measure>
        about = next((name for name in metric.split(".")[:2] if name in models), None)
        if about is None:
            raise RequestError(
                "the search is about no model of the run's own",
                cause=f"its metric is `{metric}`",
                remedy=f"give --stage with one of: {', '.join(models)}",
            )
        return about

    def by_file(self, name: str, *notes: str) -> ExportTarget:
        """With the file's own values."""
        told = self.state.stages.get(name, StageState(name))
        if not told.artifact:
            failure = f": {told.error.message}" if told.error else ""
            raise RequestError(
                f"`{name}` of the run `{self.state.run}` isn't finished",
                cause=f"the run is {self.state.status}, the stage {told.status}{failure}",
                remedy=f"give `tunery run {self.state.file}` again: it goes on from where it was",
            )
        artifact = self._artifact(name, self.experiment, told.fingerprint)
        return ExportTarget(
            self.state, self.experiment, name, None, artifact or self._removed(name, told.fingerprint), notes
        )

    def by_trial(self, name: str, asked: str) -> ExportTarget:
        """With the values of a certain trial."""
        search = self.state.search
        trials = search.trials if search else {}
        if asked not in trials:
            raise RequestError(
                f"the run `{self.state.run}` has no trial `{asked}`",
                cause="" if trials else "it has no search" if self.experiment.search is None else "no trial has begun",
                remedy=nearest(asked, [*trials, OWN]),
            )
        trial = trials[asked]
        if found := self._made_by(trial, name):
            return found
        if trial.status == "done" and not trial.stages:
            self._unknown(trial)
        made = [other.name for other in trials.values() if name in other.stages and other.stages[name].artifact]
        raise RequestError(
            f"{asked} made no `{name}`",
            cause=f"it is {trial.status}" + (f": {trial.error}" if trial.error else ""),
            remedy=f"trials that did: {', '.join(made) or 'none'}; `--trial {OWN}` takes the file's own values",
        )

    def by_best(self, name: str) -> ExportTarget:
        """With the best trial's values; with the file's own where the search didn't need the stage."""
        search = self.state.search
        if search is None or not search.finished or search.best is None:
            done = "it has not begun" if search is None else f"{search.count('done')} of {search.total} trials are done"
            raise RequestError(
                f"the search of `{self.state.run}` has no best trial yet",
                cause=done,
                remedy=f"give `tunery run {self.state.file}` again: it goes on; or take a certain trial's model with "
                f"--trial, or that of the file's own values with `--trial {OWN}`",
            )
        if found := self._made_by(search.best, name):
            return found
        if name in _measured(self.experiment):
            self._unknown(search.best)
        return self.by_file(name, f"no trial made `{name}`, because the search's metric doesn't need it")

    def _made_by(self, trial: TrialState, name: str) -> ExportTarget | None:
        """None where the trial made no such model. Raises RequestError where it was removed."""
        search, tried = self.state.search, with_overrides(self.experiment, trial.overrides)
        assert search is not None, "there is a trial"
        assert tried.search is not None, "there is a trial"
        told = trial.stages.get(name, StageState(name))
        print_ = told.fingerprint if told.artifact else ""
        if search.finished and trial is search.best:
            print_ = search.best_fingerprints.get(name, print_)
        artifact = self._artifact(name, tried, print_) if print_ else None
        if artifact is not None:
            return ExportTarget(self.state, tried, name, trial, artifact, ())
        # Of what the metric doesn't need, only what the best one's evaluation has asked for was ever made.
        if print_ and name in _measured(tried):
            self._removed(name, print_)
        return None

    def _artifact(self, name: str, experiment: Experiment, print_: str) -> Artifact | None:
        found = (store.find(experiment.stages[name].kind, print_) for store in self.stores)
        return next((artifact for artifact in found if artifact is not None), None)

    def _unknown(self, trial: TrialState) -> NoReturn:
        raise RequestError(
            f"the run `{self.state.run}` doesn't know what {trial.name} made",
            cause="it found the search in the store, where another run had left it",
            remedy=f"export it from that run; of the best trial `tunery run {self.state.file}`, given again, tells all",
        )

    def _removed(self, name: str, print_: str) -> NoReturn:
        raise RequestError(
            f"the model of `{name}` isn't in the store any more",
            cause=f"there is no {self.experiment.stages[name].kind}-{print_} in {self.stores[0].root / 'artifacts'}",
            remedy=f"give `tunery run {self.state.file}` again: it makes what is missing (of trials, the best one's); "
            "or say with --store where it is",
        )


def _measured(experiment: Experiment) -> dict[str, object]:
    """The stages that every trial makes."""
    assert experiment.search is not None, "there was a search"
    return dict(with_upstream(experiment.stages, metric_stages(experiment.search)))
