"""Which run is meant, with whose values, and what it made: a side of a comparison. From its event log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunery.errors import RequestError
from tunery.events.run_state import TrialState
from tunery.pipeline.run_record import OWN, Recorded, read_run
from tunery.search.trials import trial_named
from tunery.spec import Experiment
from tunery.spec.overrides import with_overrides
from tunery.store import Artifact, Store


@dataclass(frozen=True)
class RunSelection:
    recorded: Recorded
    experiment: Experiment
    """With the values that it was made with."""
    trial: TrialState | None
    """None: made with the file's own values."""
    best: bool
    """The trial is the one that the search ended with."""
    prints: dict[str, str]
    """Fingerprints by stage; of what was not made too, where they are known."""
    stores: tuple[Store, ...]

    @property
    def run(self) -> str:
        return self.recorded.folder.name

    @property
    def name(self) -> str:
        return self.run if self.trial is None or self.best else f"{self.run}/{self.trial.name}"

    @property
    def made(self) -> str:
        """In words: with whose values, and how far it came."""
        state = self.recorded.state
        if self.trial is None:
            searched = self.experiment.search is not None
            how = "with the file's own values" if searched else ""
            return ", ".join(part for part in (how, "" if state.status == "done" else state.status) if part)
        if self.best:
            return f"with the values of {self.trial.name}, its best trial"
        return "" if self.trial.status == "done" else self.trial.status

    def facts(self, stage: str) -> dict[str, Any]:
        """Of what the stage made: as the run told them, else from the store. Empty where it made nothing."""
        print_ = self.prints.get(stage)
        if print_ is None:
            return {}
        told = [event for event in self.recorded.events if event["event"] == "stage_finished"]
        found = next((event["facts"] for event in reversed(told) if event.get("fingerprint") == print_), None)
        if found is not None:
            return dict(found)
        artifact = self._find(stage, print_)
        return {} if artifact is None else artifact.facts

    def artifact(self, stage: str) -> Artifact | None:
        """What the stage made; None where it has made nothing. Raises RequestError where it was removed."""
        print_ = self.prints.get(stage)
        if print_ is None:
            return None
        artifact = self._find(stage, print_)
        told = any(
            event["event"] == "stage_finished" and event.get("fingerprint") == print_ for event in self.recorded.events
        )
        if artifact is None and told:
            kind = self.experiment.stages[stage].kind
            raise RequestError(
                f"what `{stage}` of {self.name} made isn't in the store any more",
                cause=f"there is no {kind}-{print_} in {self.stores[0].root / 'artifacts'}",
                remedy=f"give `tunery run {self.recorded.state.file}` again: it makes what is missing (of trials, the "
                "best one's); or say with --store where it is",
            )
        return artifact

    def _find(self, stage: str, print_: str) -> Artifact | None:
        kind = self.experiment.stages[stage].kind
        return next((found for store in self.stores if (found := store.find(kind, print_)) is not None), None)


def side(asked: str, store: Store) -> RunSelection:
    """`asked`: a run's name or folder, which means its best trial where a search has ended; RUN/TRIAL, or RUN/file for
    the file's own values. Raises RequestError where there is no such run or trial."""
    run, trial = _split_name(asked, store)
    recorded = read_run(run, store)
    # Run and store may have been moved, together or apart.
    stores = (Store(recorded.folder.absolute().parent.parent), store)
    search = recorded.state.search
    if trial is None and search is not None and search.finished and search.best is not None:
        return _of_trial(recorded, search.best, stores)
    if trial in (None, OWN):
        prints = {name: stage.fingerprint for name, stage in recorded.state.stages.items() if stage.artifact}
        return RunSelection(recorded, recorded.experiment, None, False, prints, stores)
    trials = search.trials if search is not None else {}
    return _of_trial(recorded, trials[trial_named(trial, trials, recorded.folder.name)], stores, asked=True)


def _split_name(asked: str, store: Store) -> tuple[str, str | None]:
    """The run, and the trial that follows its name."""
    run, slash, trial = asked.rpartition("/")
    is_trial = trial.startswith("trial-") or trial == OWN
    if slash and not _is_run(asked, store) and (is_trial or _is_run(run, store)):
        return run, trial
    return asked, None


def _is_run(name: str, store: Store) -> bool:
    try:
        store.find_run(name)
    except RequestError:
        return False
    return True


def _of_trial(recorded: Recorded, trial: TrialState, stores: tuple[Store, ...], *, asked: bool = False) -> RunSelection:
    search = recorded.state.search
    assert search is not None, "there is a trial"
    experiment = with_overrides(recorded.experiment, trial.overrides)
    prints = {name: stage.fingerprint for name, stage in trial.stages.items() if stage.fingerprint}
    if search.finished and trial is search.best:
        prints = {**prints, **search.best_fingerprints}
    if not prints:
        raise RequestError(
            f"the run `{recorded.folder.name}` doesn't know what {trial.name} made",
            cause="it found the search in the store, where another run had left it; or the trial has not begun",
            remedy="compare it by that run's name",
        )
    return RunSelection(recorded, experiment, trial, trial is search.best and not asked, prints, stores)
