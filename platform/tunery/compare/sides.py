"""One side of a comparison: a run or one of its trials, with its config and artifacts, from the run's event log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tunery.errors import RequestError
from tunery.events.run_state import TrialState
from tunery.pipeline.run_record import FILE_VALUES, RunRecord, read_run
from tunery.search.trials import trial_named
from tunery.spec import Experiment
from tunery.spec.overrides import with_overrides
from tunery.store import Artifact, Store


@dataclass(frozen=True)
class RunSelection:
    record: RunRecord
    experiment: Experiment
    """With the trial's overrides applied."""
    trial: TrialState | None
    """None for the file's own values."""
    best: bool
    """The trial was selected as the best of its search, not by name."""
    fingerprints: dict[str, str]
    """Fingerprints by stage, including stages that were not built if they are known."""
    stores: tuple[Store, ...]

    @property
    def run(self) -> str:
        return self.record.folder.name

    @property
    def name(self) -> str:
        return self.run if self.trial is None or self.best else f"{self.run}/{self.trial.name}"

    @property
    def description(self) -> str:
        """The values used (the file's or a trial's), and the status unless it is done."""
        state = self.record.state
        if self.trial is None:
            searched = self.experiment.search is not None
            values = "with the file's own values" if searched else ""
            return ", ".join(part for part in (values, "" if state.status == "done" else state.status) if part)
        if self.best:
            return f"with the values of its best trial, {self.trial.name}"
        return "" if self.trial.status == "done" else self.trial.status

    def facts(self, stage: str) -> dict[str, Any]:
        """The stage's facts, from the event log or else from the store. Empty if it was not built."""
        fingerprint = self.fingerprints.get(stage)
        if fingerprint is None:
            return {}
        finished = [event for event in self.record.events if event["event"] == "stage_finished"]
        facts = next((event["facts"] for event in reversed(finished) if event.get("fingerprint") == fingerprint), None)
        if facts is not None:
            return dict(facts)
        artifact = self._find(stage, fingerprint)
        return {} if artifact is None else artifact.facts

    def artifact(self, stage: str) -> Artifact | None:
        """The stage's artifact; None if it was not built. Raises RequestError if it was removed from the store."""
        fingerprint = self.fingerprints.get(stage)
        if fingerprint is None:
            return None
        artifact = self._find(stage, fingerprint)
        was_built = any(
            event["event"] == "stage_finished" and event.get("fingerprint") == fingerprint
            for event in self.record.events
        )
        if artifact is None and was_built:
            kind = self.experiment.stages[stage].kind
            raise RequestError(
                f"the artifact of `{stage}` of {self.name} is no longer in the store",
                cause=f"there is no {kind}-{fingerprint} in {self.stores[0].root / 'artifacts'}",
                remedy=f"run `tunery run {self.record.state.file}` again to rebuild it (for trials: only the best "
                "one's), or use --store with its store",
            )
        return artifact

    def _find(self, stage: str, fingerprint: str) -> Artifact | None:
        kind = self.experiment.stages[stage].kind
        candidates = (store.find(kind, fingerprint) for store in self.stores)
        return next((artifact for artifact in candidates if artifact is not None), None)


def select_run(name: str, store: Store) -> RunSelection:
    """Resolve `name`: a run's name or folder, which selects its best trial if its search has ended; RUN/TRIAL; or
    RUN/file for the file's own values. Raises RequestError if there is no such run or trial."""
    run, trial = _split_name(name, store)
    record = read_run(run, store)
    # The run's folder and the store may have been moved, together or separately.
    stores = (Store(record.folder.absolute().parent.parent), store)
    search = record.state.search
    if trial is None and search is not None and search.finished and search.best is not None:
        return _select_trial(record, search.best, stores)
    if trial in (None, FILE_VALUES):
        fingerprints = {name: stage.fingerprint for name, stage in record.state.stages.items() if stage.artifact}
        return RunSelection(record, record.experiment, None, False, fingerprints, stores)
    trials = search.trials if search is not None else {}
    return _select_trial(record, trials[trial_named(trial, trials, record.folder.name)], stores, by_name=True)


def _split_name(name: str, store: Store) -> tuple[str, str | None]:
    """Split RUN/TRIAL into run and trial; the trial is None if there is none."""
    run, slash, trial = name.rpartition("/")
    is_trial = trial.startswith("trial-") or trial == FILE_VALUES
    if slash and not _is_run(name, store) and (is_trial or _is_run(run, store)):
        return run, trial
    return name, None


def _is_run(name: str, store: Store) -> bool:
    try:
        store.find_run(name)
    except RequestError:
        return False
    return True


def _select_trial(
    record: RunRecord, trial: TrialState, stores: tuple[Store, ...], *, by_name: bool = False
) -> RunSelection:
    search = record.state.search
    assert search is not None, "a run with trials has a search"
    experiment = with_overrides(record.experiment, trial.overrides)
    fingerprints = {name: stage.fingerprint for name, stage in trial.stages.items() if stage.fingerprint}
    if search.finished and trial is search.best:
        fingerprints = {**fingerprints, **search.best_fingerprints}
    if not fingerprints:
        raise RequestError(
            f"the event log of `{record.folder.name}` has no artifacts of {trial.name}",
            cause="the run reused the search of another run from the store, or the trial has not started",
            remedy="use the run that ran the search",
        )
    return RunSelection(record, experiment, trial, trial is search.best and not by_name, fingerprints, stores)
