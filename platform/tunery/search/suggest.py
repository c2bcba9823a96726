"""Search algorithms: random, grid, and Optuna's samplers (TPE, NSGA-II)."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tunery.events.ranking import objective_value, objectives, violations
from tunery.search.space import Point, grid, grid_point, random_point, rounded, sample_point, trial_id
from tunery.spec import Dimension, Search

if TYPE_CHECKING:
    import optuna

MAX_RETRIES = 100
"""Attempts to sample a point that was not suggested before; small spaces are exhausted."""
MAX_STARTUP_TRIALS = 10
"""Random trials before TPE fits a model (Optuna's default); a quarter of the trials in searches of fewer than 40."""
NUMBER = "number"
Reports = Sequence[Mapping[str, float]]
"""Intermediate evaluations, in order."""


class Suggester(Protocol):
    """A search algorithm, called from one thread.

    Suggestions depend only on the seed, the trial numbers and the outcomes passed to `tell`, so a resumed search
    continues as it would have without the interruption.
    """

    def ask(self, number: int, initial_point: Point | None) -> Point | None:
        """Return the values of the trial with this number, including those of `initial_point`; None if the space is
        exhausted."""

    def tell(
        self, number: int, overrides: Point, reports: Sequence[Mapping[str, float]], ended: dict[str, Any]
    ) -> None:
        """Record the outcome of a trial (search/journal.py), whether it was suggested or not. Idempotent."""


def suggester(search: Search, seed: int, folder: Path, earlier: Sequence[dict[str, Any]]) -> Suggester:
    """Return the algorithm of the search. `folder` is where it may keep its state. `earlier` are trials of other
    searches for a warm start, as `trial_finished` events."""
    if search.algorithm == "grid":
        return GridSearch(search)
    if search.algorithm == "random":
        return RandomSearch(search, seed)
    return OptunaSearch(search, seed, folder, earlier)


class RandomSearch:
    def __init__(self, search: Search, seed: int) -> None:
        self._space, self._seed = search.space, seed
        self._suggested: set[str] = set()

    def ask(self, number: int, initial_point: Point | None) -> Point | None:
        for attempt in range(MAX_RETRIES):
            # Retries use numbers that no trial has.
            fixed = {**grid_point(self._space, number), **(initial_point or {})}
            point = random_point(self._space, self._seed, number + attempt * 1_000_000, fixed)
            if (name := trial_id(point)) not in self._suggested:
                self._suggested.add(name)
                return point
        return None

    def tell(
        self, number: int, overrides: Point, reports: Sequence[Mapping[str, float]], ended: dict[str, Any]
    ) -> None:
        self._suggested.add(trial_id(overrides))


class GridSearch:
    def __init__(self, search: Search) -> None:
        self._points = list(itertools.islice(grid(search.space), search.trials))
        self._suggested: set[str] = set()

    def ask(self, number: int, initial_point: Point | None) -> Point | None:
        remaining = [point for point in self._points if trial_id(point) not in self._suggested]
        if initial_point is not None and trial_id(initial_point) not in self._suggested:
            # Dimensions that it leaves out are taken from the first combination that agrees with it.
            matching = (
                point for point in remaining if all(point.get(path) == value for path, value in initial_point.items())
            )
            result = next(matching, initial_point)
        elif remaining:
            result = remaining[0]
        else:
            return None
        self._suggested.add(trial_id(result))
        return result

    def tell(
        self, number: int, overrides: Point, reports: Sequence[Mapping[str, float]], ended: dict[str, Any]
    ) -> None:
        self._suggested.add(trial_id(overrides))


class OptunaSearch:
    """An Optuna study, stored in a file of the search's staging directory so that it survives a kill.

    Enumerated values are passed to Optuna as indices: its categorical values must be scalars, but a dimension may
    choose among mappings (a tuner).
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
        self._suggested: set[str] = set()
        self._finished = {trial.user_attrs.get(NUMBER) for trial in self._study.trials if trial.state.is_finished()}
        if not self._study.trials:
            for index, trial in enumerate(earlier):
                self._add_finished_trial(-1 - index, trial["overrides"], trial)

    @property
    def _objectives(self) -> list[tuple[str, str]]:
        return objectives(self._search.metric, self._search.mode, self._search.objectives)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Return a sampler for one trial, seeded by its number and not by what was sampled before."""
        import optuna

        seed = (self._seed * 1_000_003 + number) % 2**32
        if self._search.algorithm == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, self._search.trials // 4)))
        return optuna.samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,  # conditional dimensions: those that occur together are modelled jointly
            constant_liar=True,  # running trials count as bad, so that concurrent trials explore other regions
            n_startup_trials=min(MAX_STARTUP_TRIALS, max(1, self._search.trials // 4)),
        )

    def ask(self, number: int, initial_point: Point | None) -> Point | None:
        for attempt in range(MAX_RETRIES):
            self._study.sampler = self._sampler(number + attempt * 1_000_000)
            fixed = {**grid_point(self._search.space, number), **(initial_point or {})}
            params = {path: _encode_value(self._search.space[path], value) for path, value in fixed.items()}
            self._study.enqueue_trial(params, user_attrs={NUMBER: number})
            trial = self._study.ask()
            point = sample_point(self._search.space, partial(_suggest_value, trial))
            if (name := trial_id(point)) not in self._suggested:
                self._suggested.add(name)
                return point
            self._study.tell(trial, state=optuna_state("failed"))
        return None

    def tell(
        self, number: int, overrides: Point, reports: Sequence[Mapping[str, float]], ended: dict[str, Any]
    ) -> None:
        import optuna

        self._suggested.add(trial_id(overrides))
        if number in self._finished:
            return
        self._finished.add(number)
        matches = [trial for trial in self._study.trials if trial.user_attrs.get(NUMBER) == number]
        running = [trial for trial in matches if not trial.state.is_finished()]
        if not running:
            self._add_finished_trial(number, overrides, ended)
            return
        trial = optuna.trial.Trial(self._study, running[-1]._trial_id)
        values = self._objective_values(ended)
        if values is None and len(self._objectives) == 1:
            for index, report in enumerate(reports):
                if self._search.metric in report and not math.isnan(report[self._search.metric]):
                    trial.report(report[self._search.metric], index)
        for index, violation in enumerate(violations(self._search, ended["values"]) if values else ()):
            trial.set_constraint(str(index), min(violation, 1e300))
        if values is not None:
            self._study.tell(trial, values)
        else:
            self._study.tell(trial, state=optuna_state(ended["state"] if len(self._objectives) == 1 else "failed"))

    def _add_finished_trial(self, number: int, overrides: Point, ended: dict[str, Any]) -> None:
        """Add a trial that this study did not suggest, if its values are in the space."""
        import optuna

        space = self._search.space
        inside = {path: value for path, value in overrides.items() if path in space and space[path].contains(value)}
        values = self._objective_values(ended)
        if values is None or sample_point(space, lambda path, dimension: inside.get(path)) != inside:
            return
        constraints = {str(i): min(v, 1e300) for i, v in enumerate(violations(self._search, ended["values"]))}
        self._study.add_trial(
            optuna.trial.create_trial(
                values=values,
                params={path: _encode_value(space[path], value) for path, value in inside.items()},
                distributions={path: _distribution(space[path]) for path in inside},
                user_attrs={NUMBER: number},
                constraints=constraints or None,
            )
        )

    def _objective_values(self, ended: dict[str, Any]) -> list[float] | None:
        """Return the value of each objective; None if the trial did not finish or a value is missing."""
        if ended["state"] != "done":
            return None
        values = [ended["values"].get(metric, math.nan) for metric, _ in self._objectives]
        if len(values) == 1:
            values = [objective_value(self._search, ended["values"])]
        return None if any(math.isnan(value) for value in values) else values


def optuna_state(state: str) -> Any:
    """Return PRUNED for stopped trials (Optuna learns from the last reported value), FAIL for others (ignored)."""
    import optuna

    return optuna.trial.TrialState.PRUNED if state == "stopped" else optuna.trial.TrialState.FAIL


def _encode_value(dimension: Dimension, value: Any) -> Any:
    options = dimension.choice or dimension.grid
    return value if options is None else options.index(value)


def _suggest_value(trial: optuna.Trial, path: str, dimension: Dimension) -> Any:
    if (options := dimension.choice or dimension.grid) is not None:
        return options[trial.suggest_categorical(path, range(len(options)))]
    low, high = _range(dimension)
    if dimension.integer is not None:
        return trial.suggest_int(path, int(low), int(high), step=round(dimension.step or 1))
    value = trial.suggest_float(path, low, high, step=dimension.step, log=dimension.loguniform is not None)
    return rounded(value, dimension)


def _distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """Return the distribution that `_suggest_value` samples from."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if (options := dimension.choice or dimension.grid) is not None:
        return CategoricalDistribution(range(len(options)))
    low, high = _range(dimension)
    if dimension.integer is not None:
        return IntDistribution(int(low), int(high), step=round(dimension.step or 1))
    return FloatDistribution(low, high, log=dimension.loguniform is not None, step=dimension.step)


def _range(dimension: Dimension) -> tuple[float, float]:
    """Return the bounds; Optuna requires that the range is divisible by the step."""
    assert dimension.bounds is not None, "a dimension has exactly one kind"
    low, high = dimension.bounds
    return low, dimension.enumerated[-1] if dimension.enumerated is not None else high
