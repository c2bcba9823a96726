"""What the metric of a search depends on: the share of its differences that each searched field explains. Pure."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tunery.events.formatting import as_number, plain
from tunery.events.run_state import SearchState, TrialState

ENOUGH = 8
"""Trials. Of fewer, three groups have one or two members each, and every share is noise."""
FEW = 5
"""Numbers with no more values than this are groups as they are."""


@dataclass(frozen=True)
class Importance:
    """Of one searched field."""

    path: str
    share: float | None
    """0 .. 1; None where too few trials have the field, or all have the same value."""
    trials: int
    """Those that have it: a conditional field is not in all of them."""
    beyond_chance: bool
    """Chance alone gives so large a share in fewer than one of 20 cases."""


def importances(search: SearchState, paths: Sequence[str], metric: str = "") -> list[Importance]:
    """The largest share first. `metric`: one of several; else the value that the search goes by.

    A one-way analysis of variance of each field by itself, over the ranks of the trials that ran to their end: their
    values are put in groups (few values and words as they are, other numbers in 3 to 5 groups of equal size), and the
    share is that of the variance between groups, corrected for the number of groups, so that chance alone gives about 0
    (eta squared of the Kruskal-Wallis test, Tomczak and Tomczak 2014). Ranks, because one diverged trial would
    otherwise be nearly all of the variance.

    What it can't tell: what two fields do only together (it is in neither's share); how fields that were drawn
    together share what they explain (it is in both); and what lies within a group. Shares needn't add up to 1.
    An algorithm that draws near the best trials, and a scheduler that stops the worse ones, leave less to explain. A
    conditional field is judged among the trials that have it.
    """
    values = _values(search, metric)
    ended = [trial for trial in search.own if trial.name in values]
    found = [_importance(path, [trial for trial in ended if path in trial.present], values) for path in paths]
    return sorted(found, key=lambda one: -1.0 if one.share is None else one.share, reverse=True)


def too_few(search: SearchState) -> str:
    """Why nothing is said about importance; "" where there are trials enough."""
    ended = sum(trial.status == "done" and trial.value is not None for trial in search.own)
    if ended >= ENOUGH:
        return ""
    return f"{ended} trials ran to their end: too few to say what the metric depends on (from {ENOUGH} on it is told)"


def _importance(path: str, own: Sequence[TrialState], values: Mapping[str, float]) -> Importance:
    """`own`: the trials that have the field."""
    groups = _groups([trial.present[path] for trial in own])
    n, k = len(own), len(set(groups))
    if n < ENOUGH or k < 2 or n - k < 2:
        return Importance(path, None, n, False)
    ranks = _ranks([values[trial.name] for trial in own])
    middle = (n + 1) / 2
    whole = sum((rank - middle) ** 2 for rank in ranks)
    if not whole:  # every trial has the same value
        return Importance(path, 0.0, n, False)
    by_group: dict[str, list[float]] = {}
    for group, rank in zip(groups, ranks, strict=True):
        by_group.setdefault(group, []).append(rank)
    between = sum(len(members) * (sum(members) / len(members) - middle) ** 2 for members in by_group.values())
    statistic = (n - 1) * between / whole  # Kruskal-Wallis' H, about chi squared with k - 1 degrees of freedom
    return Importance(path, max(0.0, (statistic - k + 1) / (n - k)), n, statistic > _chi_squared_95(k - 1))


def _values(search: SearchState, metric: str) -> dict[str, float]:
    """Of the trials that ran to their end, by name; of repeated ones the mean over seeds of what the search goes by."""
    ended = [trial for trial in search.own if trial.status == "done"]
    if metric and metric != search.value_name:
        return {trial.name: trial.values[metric] for trial in ended if metric in trial.values}
    means = {name: standing.mean for name, standing in search.standings.items()}
    return {trial.name: means.get(trial.name, trial.value) for trial in ended if trial.value is not None}


def _groups(values: Sequence[object]) -> list[str]:
    """The group of each value. Equal numbers are never parted."""
    numbers = [as_number(value) for value in values]
    distinct = sorted({number for number in numbers if number is not None})
    if None in numbers or len(distinct) <= FEW:
        return [plain(value) for value in values]
    groups = 3 if len(values) < 24 else 4 if len(values) < 48 else 5
    ordered = sorted(number for number in numbers if number is not None)
    edges = [ordered[len(ordered) * index // groups] for index in range(1, groups)]
    return [str(sum(edge <= (number or 0.0) for edge in edges)) for number in numbers]


def _ranks(values: Sequence[float]) -> list[float]:
    """From 1; equal values share the mean of their places."""
    ordered = sorted(values)
    first = {value: place for place, value in reversed(list(enumerate(ordered, start=1)))}
    times = Counter(values)
    return [first[value] + (times[value] - 1) / 2 for value in values]


def _chi_squared_95(freedom: int) -> float:
    """95 of 100 draws are below it (Wilson and Hilferty's approximation)."""
    step = 2 / (9 * freedom)
    return float(freedom * (1 - step + 1.645 * math.sqrt(step)) ** 3)
