"""Ranking of trials: weighted sums, constraints, Pareto fronts and statistics over seeds. No I/O, no Ray.

Used by the search while it runs, by its artifact, and by the run state that the terminal view and the report show.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, variance
from typing import Any, NamedTuple, Protocol

from tunery.spec import Search

Values = Mapping[str, float]
"""By metric."""
TrialFacts = Mapping[str, Any]
"""A trial in the facts of a search artifact (search/outcome.py)."""
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120)
"""Quantiles of Student's t, two-sided 95%, for 1, 2, .. degrees of freedom; the limit is 1.96."""


class FurtherObjective(Protocol):
    """A metric of a search besides the first one."""

    @property
    def metric(self) -> str: ...
    @property
    def mode(self) -> str: ...
    @property
    def weight(self) -> float | None: ...


def objectives(metric: str, mode: str, further: Sequence[FurtherObjective]) -> list[tuple[str, str]]:
    """Return (metric, mode) of each objective: one if `further` ones have weights, since they form one weighted sum."""
    weighted = any(item.weight is not None for item in further)
    return [(metric, mode), *(() if weighted else ((item.metric, item.mode) for item in further))]


def cost(mode: str, value: float) -> float:
    """Return the value of a metric with the sign that makes lower better."""
    return -value if mode == "max" else value


def objective_value(search: Search, values: Values) -> float:
    """Return the first metric or the weighted sum, to be optimised in the first metric's `mode`. NaN if a metric is
    missing."""
    total = cost(search.mode, values.get(search.metric, math.nan))
    for item in search.objectives:
        if item.weight is not None:
            total += item.weight * cost(item.mode, values.get(item.metric, math.nan))
    return cost(search.mode, total)


def violations(search: Search, values: Values) -> list[float]:
    """Return by how much each constraint is violated; 0 or less if it is satisfied."""
    return [item.violation(values.get(item.metric, math.nan)) for item in search.constraints]


def feasible(search: Search, values: Values) -> bool:
    return all(violation <= 0 for violation in violations(search, values))


class RankKey(NamedTuple):
    """Sort key of a trial, best first."""

    has_no_value: bool
    is_unfinished: bool
    """Stopped or failed: its value is from less training, and it has no model."""
    is_infeasible: bool
    has_one_seed: bool
    """A trial with several seeds ranks by their mean, before the others, whose better value may be chance."""
    cost: float
    """Lower is better."""

    @property
    def is_finished(self) -> bool:
        return not self.has_no_value and not self.is_unfinished


def rank_key(
    mode: str, *, value: float | None, done: bool, feasible: bool, mean_over_seeds: float | None = None
) -> RankKey:
    """Return the key of a trial of a search with this `mode`."""
    ranked_value = value if mean_over_seeds is None else mean_over_seeds
    if ranked_value is None or math.isnan(ranked_value):
        return RankKey(True, not done, not feasible, mean_over_seeds is None, 0.0)
    return RankKey(False, not done, not feasible, mean_over_seeds is None, cost(mode, ranked_value))


def rank_of(search: Search, trial: TrialFacts) -> RankKey:
    """Return the key of a trial by its first seed."""
    is_feasible = feasible(search, trial["values"])
    return rank_key(search.mode, value=trial["value"], done=trial["state"] == "done", feasible=is_feasible)


def pareto_front(search: Search, trials: Sequence[TrialFacts]) -> set[str]:
    """Return the names of the finished, feasible trials that no other such trial dominates. Empty with one
    objective."""
    metrics = objectives(search.metric, search.mode, search.objectives)
    if len(metrics) == 1:
        return set()
    ranks = {trial["trial"]: rank_of(search, trial) for trial in trials}
    points = {
        trial["trial"]: [cost(mode, trial["values"].get(metric, math.nan)) for metric, mode in metrics]
        for trial in trials
        if ranks[trial["trial"]].is_finished and not ranks[trial["trial"]].is_infeasible
    }
    return {
        name
        for name, point in points.items()
        if not any(_dominates(other, point) for rival, other in points.items() if rival != name)
    }


def _dominates(one: Sequence[float], other: Sequence[float]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


@dataclass(frozen=True)
class TrialRank:
    """Statistics of one trial over several seeds."""

    trial: str
    values: tuple[float, ...]
    mean: float
    ci_half_width: float | None
    """Half the width of the 95% confidence interval of the mean; None with a single seed."""


def seed_stats(groups: Mapping[str, Sequence[float]]) -> list[TrialRank]:
    """Statistics of each trial's values over its seeds. The standard deviation is pooled over trials: with three seeds
    per trial an estimate from one trial is too noisy."""
    std, dof = _pooled_std(groups.values())
    stats = []
    for trial, values in groups.items():
        half_width = None
        if dof and len(values) > 1:
            half_width = t_quantile(dof) * std / math.sqrt(len(values))
        stats.append(TrialRank(trial, tuple(values), mean(values), half_width))
    return stats


def statistical_ties(best: TrialRank, others: Iterable[TrialRank], groups: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the trials whose mean does not differ significantly from the best one's (Student's t test at 5% with the
    pooled standard deviation). Empty if no trial has a second seed."""
    std, dof = _pooled_std(groups.values())
    if not dof:
        return []
    n = len(best.values)
    return [
        other.trial
        for other in others
        if other.trial != best.trial
        and abs(other.mean - best.mean) <= t_quantile(dof) * std * math.sqrt(1 / n + 1 / len(other.values))
    ]


def _pooled_std(groups: Iterable[Sequence[float]]) -> tuple[float, int]:
    """Return the pooled standard deviation over seeds and its degrees of freedom."""
    replicated = [values for values in groups if len(values) > 1]
    dof = sum(len(values) - 1 for values in replicated)
    squares = sum((len(values) - 1) * variance(values) for values in replicated)
    return (math.sqrt(squares / dof), dof) if dof else (0.0, 0)


def t_quantile(dof: int) -> float:
    return T_95[dof - 1] if dof <= len(T_95) else 1.96 + 2.5 / dof
