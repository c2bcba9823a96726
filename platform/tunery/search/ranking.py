"""Which trial is better: weighted sums, constraints, Pareto fronts, and what several seeds say. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, variance
from typing import Any

from tunery.spec import Search

Values = Mapping[str, float]
"""By metric."""
Trial = Mapping[str, Any]
"""As a search's artifact has it (search/tune.py)."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
"""Student's t, two-sided 95%, for 1, 2, .. degrees of freedom; 1.96 is its limit."""


def objectives(search: Search) -> list[tuple[str, str]]:
    """(metric, mode) of what is optimised apart: one where `objectives` has weights, else all of them."""
    first: list[tuple[str, str]] = [(search.metric, search.mode)]
    weighted = any(item.weight is not None for item in search.objectives)
    return first if weighted else [*first, *((item.metric, item.mode) for item in search.objectives)]


def value_of(search: Search, values: Values) -> float:
    """The first metric, or the weighted sum, whose sign is as the first metric's `mode` has it. NaN without one."""
    sign = 1 if search.mode == "min" else -1
    total = sign * values.get(search.metric, math.nan)
    for item in search.objectives:
        if item.weight is not None:
            total += item.weight * (1 if item.mode == "min" else -1) * values.get(item.metric, math.nan)
    return sign * total


def violations(search: Search, values: Values) -> list[float]:
    """By how much each constraint is broken; 0 or less where it is kept."""
    return [item.excess(values.get(item.metric, math.nan)) for item in search.constraints]


def feasible(search: Search, values: Values) -> bool:
    return all(excess <= 0 for excess in violations(search, values))


def rank(search: Search, trial: Trial) -> tuple[bool, bool, float]:
    """To sort by, best first: those that ran to their end (a stopped trial has no model), those that keep to the
    constraints, the better value."""
    value = math.nan if trial["value"] is None else float(trial["value"])
    lost = trial["state"] != "done" or math.isnan(value)
    merit = math.inf if math.isnan(value) else (value if search.mode == "min" else -value)
    return lost, not feasible(search, trial["values"]), merit


def pareto_front(search: Search, trials: Sequence[Trial]) -> set[str]:
    """Names of the trials that no other is better than in one metric without being worse in another; of those that
    ended and keep to the constraints."""
    if len(objectives(search)) == 1:
        return set()
    signs = [(metric, 1 if mode == "min" else -1) for metric, mode in objectives(search)]
    points = {
        trial["trial"]: [sign * trial["values"].get(metric, math.nan) for metric, sign in signs]
        for trial in trials
        if not any(rank(search, trial)[:2])
    }
    return {
        name
        for name, own in points.items()
        if not any(_dominates(other, own) for rival, other in points.items() if rival != name)
    }


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


@dataclass(frozen=True)
class TrialRank:
    """What several seeds say of one trial."""

    trial: str
    values: tuple[float, ...]
    mean: float
    half: float | None
    """Half of the 95% interval of the mean; None of a single seed."""


def standings(groups: Mapping[str, Sequence[float]]) -> list[TrialRank]:
    """Of each trial's values over its seeds. The spread over seeds is taken to be the same for all of them: with three
    seeds each an estimate from one trial alone would be worth nothing."""
    spread, freedom = _pooled(groups.values())
    found = []
    for trial, values in groups.items():
        half = None
        if freedom and len(values) > 1:
            half = t_quantile(freedom) * spread / math.sqrt(len(values))
        found.append(TrialRank(trial, tuple(values), mean(values), half))
    return found


def statistical_ties(best: TrialRank, others: Iterable[TrialRank], groups: Mapping[str, Sequence[float]]) -> list[str]:
    """Those whose mean differs from the best one's by no more than chance gives in 19 of 20 cases (Student's t with the
    pooled spread). Without a second seed nothing can be told apart, and nothing is said."""
    spread, freedom = _pooled(groups.values())
    if not freedom:
        return []
    n = len(best.values)
    return [
        other.trial
        for other in others
        if other.trial != best.trial
        and abs(other.mean - best.mean) <= t_quantile(freedom) * spread * math.sqrt(1 / n + 1 / len(other.values))
    ]


def _pooled(groups: Iterable[Sequence[float]]) -> tuple[float, int]:
    """The standard deviation over seeds, and its degrees of freedom."""
    several = [values for values in groups if len(values) > 1]
    freedom = sum(len(values) - 1 for values in several)
    squares = sum((len(values) - 1) * variance(values) for values in several)
    return (math.sqrt(squares / freedom), freedom) if freedom else (0.0, 0)


def t_quantile(freedom: int) -> float:
    return T_95[freedom - 1] if freedom <= len(T_95) else 1.96 + 2.5 / freedom
