"""What to try next: by chance, a grid, or Optuna's samplers, one class each."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tunery.search.ranking import objectives, value_of, violations
from tunery.search.space import Point, grid, grid_point, point_by_chance, rounded, sample_point, trial_id
from tunery.spec import Dimension, Search

if TYPE_CHECKING:
    import optuna

TRIES = 100
"""To draw a trial that was not there before; a space of few values runs out."""
MAX_RANDOM = 10
"""Random trials that TPE begins with, as Optuna has it; of a search of fewer than 40 trials a quarter of them."""
NUMBER = "number"
Reports = Sequence[Mapping[str, float]]
"""Evaluations on the way, one after another."""


class Suggester(Protocol):
    """Asked by one thread. What it gives depends on the seed, the numbers and what it was told, so that a search that
    was killed goes on as it would have gone."""

    def ask(self, number: int, first: Point | None) -> Point | None:
        """Values for the trial of this number, those of `initial_points` among them; None when nothing new is left."""

    def tell(
        self, number: int, overrides: Point, reports: Sequence[Mapping[str, float]], ended: dict[str, Any]
    ) -> None:
        """What became of a trial (see search/journal.py), asked for or not. Told twice is told once."""


def suggester(search: Search, seed: int, folder: Path, earlier: Sequence[dict[str, Any]]) -> Suggester:
    """`folder`: where it may keep what it was told. `earlier`: trials of other searches, as an event log tells them."""
    if search.algorithm == "grid":
        return GridSearch(search)
    if search.algorithm == "random":
        return RandomSearch(search, seed)
    return OptunaSearch(search, seed, folder, earlier)


class RandomSearch:
    def __init__(self, search: Search, seed: int) -> None:
        self._space, self._seed = search.space, seed
        self._given: set[str] = set()

    def ask(self, number: int, first: Point | None) -> Point | None:
        for attempt in range(TRIES):
            # The numbers of further attempts are nobody else's.
            given = {**grid_point(self._space, number), **(first or {})}
            found = point_by_chance(self._space, self._seed, number + attempt * 1_000_000, given)
            if (name := trial_id(found)) not in self._given:
                self._given.add(name)
                return found
        return None

    def tell(
        self, number: int, overrides: Point, reports: Sequence[Mapping[str, float]], ended: dict[str, Any]
    ) -> None:
        self._given.add(trial_id(overrides))


class GridSearch:
    def __init__(self, search: Search) -> None:
        self._points = list(itertools.islice(grid(search.space), search.trials))
        self._given: set[str] = set()

    def ask(self, number: int, first: Point | None) -> Point | None:
        left = [sample_point for sample_point in self._points if trial_id(sample_point) not in self._given]
        if first is not None and trial_id(first) not in self._given:
            # What it leaves out is as in the first combination that agrees with it.
            agreeing = (
                sample_point
                for sample_point in left
                if all(sample_point.get(path) == value for path, value in first.items())
            )
            found = next(agreeing, first)
        elif left:
            found = left[0]
        else:
            return None
        self._given.add(trial_id(found))
        return found

    def tell(
        self, number: int, overrides: Point, reports: Sequence[Mapping[str, float]], ended: dict[str, Any]
    ) -> None:
        self._given.add(trial_id(overrides))


class OptunaSearch:
    """An Optuna study in a file of the search's work folder: it outlives this process.

    A listed value goes by its index: Optuna's own categories are plain values only, and a dimension may choose among
    mappings (a tuner).
    """

    def __init__(self, search: Search, seed: int, folder: Path, earlier: Sequence[dict[str, Any]]) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
        folder.mkdir(parents=True, exist_ok=True)
        self._search, self._seed = search, seed
        directions: dict[str, Literal["minimize", "maximize"]] = {"min": "minimize", "max": "maximize"}
        self._study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(folder / "optuna.log"))),
            study_name="search",
            load_if_exists=True,
            directions=[directions[mode] for _, mode in self._objectives],
            sampler=self._sampler(0),
        )
        self._given: set[str] = set()
        self._told = {trial.user_attrs.get(NUMBER) for trial in self._study.trials if trial.state.is_finished()}
        if not self._study.trials:
            for index, trial in enumerate(earlier):
                self._add(-1 - index, trial["overrides"], trial)

    @property
    def _objectives(self) -> list[tuple[str, str]]:
        return objectives(self._search)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """For one trial: its chance depends on nothing that was drawn before."""
        import optuna

        seed = (self._seed * 1_000_003 + number) % 2**32
        if self._search.algorithm == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, self._search.trials // 4)))
        return optuna.samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,  # conditional dimensions: those that occur together are modelled together
            constant_liar=True,  # trials that still run count as bad, so that those beside them look elsewhere
            n_startup_trials=min(MAX_RANDOM, max(1, self._search.trials // 4)),
        )

    def ask(self, number: int, first: Point | None) -> Point | None:
        for attempt in range(TRIES):
            self._study.sampler = self._sampler(number + attempt * 1_000_000)
            fixed = {**grid_point(self._search.space, number), **(first or {})}
            params = {path: _coded(self._search.space[path], value) for path, value in fixed.items()}
            self._study.enqueue_trial(params, user_attrs={NUMBER: number})
            trial = self._study.ask()
            found = sample_point(self._search.space, partial(_drawn, trial))
            if (name := trial_id(found)) not in self._given:
                self._given.add(name)
                return found
            self._study.tell(trial, state=optuna_state("failed"))
        return None

    def tell(
        self, number: int, overrides: Point, reports: Sequence[Mapping[str, float]], ended: dict[str, Any]
    ) -> None:
        import optuna

        self._given.add(trial_id(overrides))
        if number in self._told:
            return
        self._told.add(number)
        asked = [trial for trial in self._study.trials if trial.user_attrs.get(NUMBER) == number]
        running = [trial for trial in asked if not trial.state.is_finished()]
        if not running:
            self._add(number, overrides, ended)
            return
        trial = optuna.trial.Trial(self._study, running[-1]._trial_id)
        values = self._values(ended)
        if values is None and len(self._objectives) == 1:
            for index, report in enumerate(reports):
                if self._search.metric in report and not math.isnan(report[self._search.metric]):
                    trial.report(report[self._search.metric], index)
        for index, excess in enumerate(violations(self._search, ended["values"]) if values else ()):
            trial.set_constraint(str(index), min(excess, 1e300))
        if values is not None:
            self._study.tell(trial, values)
        else:
            self._study.tell(trial, state=optuna_state(ended["state"] if len(self._objectives) == 1 else "failed"))

    def _add(self, number: int, overrides: Point, ended: dict[str, Any]) -> None:
        """A trial that was not asked for here, where its values are those of this space."""
        import optuna

        space = self._search.space
        inside = {path: value for path, value in overrides.items() if path in space and space[path].holds(value)}
        values = self._values(ended)
        if values is None or sample_point(space, lambda path, dimension: inside.get(path)) != inside:
            return
        constraints = {str(i): min(e, 1e300) for i, e in enumerate(violations(self._search, ended["values"]))}
        self._study.add_trial(
            optuna.trial.create_trial(
                values=values,
                params={path: _coded(space[path], value) for path, value in inside.items()},
                distributions={path: _distribution(space[path]) for path in inside},
                user_attrs={NUMBER: number},
                constraints=constraints or None,
            )
        )

    def _values(self, ended: dict[str, Any]) -> list[float] | None:
        """Of each objective; None where the trial has not all of them."""
        if ended["state"] != "done":
            return None
        found = [ended["values"].get(metric, math.nan) for metric, _ in self._objectives]
        if len(found) == 1:
            found = [value_of(self._search, ended["values"])]
        return None if any(math.isnan(value) for value in found) else found


def optuna_state(state: str) -> Any:
    """stopped: Optuna learns from the last value that was reported; failed: nothing is learned."""
    import optuna

    return optuna.trial.TrialState.PRUNED if state == "stopped" else optuna.trial.TrialState.FAIL


def _coded(dimension: Dimension, value: Any) -> Any:
    listed = dimension.choice or dimension.grid
    return value if listed is None else listed.index(value)


def _drawn(trial: optuna.Trial, path: str, dimension: Dimension) -> Any:
    if (listed := dimension.choice or dimension.grid) is not None:
        return listed[trial.suggest_categorical(path, range(len(listed)))]
    low, high = _range(dimension)
    if dimension.integer is not None:
        return trial.suggest_int(path, int(low), int(high), step=round(dimension.step or 1))
    value = trial.suggest_float(path, low, high, step=dimension.step, log=dimension.loguniform is not None)
    return rounded(value, dimension)


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """What `_drawn` asks by."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if (listed := dimension.choice or dimension.grid) is not None:
        return CategoricalDistribution(range(len(listed)))
    low, high = _range(dimension)
    if dimension.integer is not None:
        return IntDistribution(int(low), int(high), step=round(dimension.step or 1))
    return FloatDistribution(low, high, log=dimension.loguniform is not None, step=dimension.step)


def _range(dimension: Dimension) -> tuple[float, float]:
    """Optuna wants one that its steps fill."""
    assert dimension.bounds is not None, "a dimension has exactly one kind"
    low, high = dimension.bounds
    return low, dimension.listed[-1] if dimension.listed is not None else high
