"""What came out of a search: its trials, best first, and who won. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from tunery.search.journal import JournalRecord
from tunery.search.ranking import feasible, pareto_front, rank, standings, statistical_ties, value_of
from tunery.spec import Search


def facts_of(search: Search, records: Sequence[JournalRecord], ended_by: str) -> dict[str, Any]:
    """trials: best first, those that repeat another after them; each {trial, overrides, origin, of, state, value (the
    metric, or the weighted sum; null without one), values {metric: number}, feasible, steps, tokens, rows, seconds,
    error}. best: the winner, null when no trial ran to its end. standings: of those that were repeated mean, half of
    the 95% interval and values over seeds. ties: whose mean can't be told from the winner's. front: the Pareto front.
    ended_by: what ended the search early."""
    trials = sorted((_trial(search, record) for record in records), key=lambda trial: rank(search, trial))
    own = [trial for trial in trials if trial["origin"] != "replicate"]
    again = [trial for trial in trials if trial["origin"] == "replicate"]
    ended = [trial for trial in own if not rank(search, trial)[0]]
    groups: dict[str, list[float]] = {}
    diverged: dict[str, int] = {}
    for trial in ended:
        twins = [twin["value"] for twin in again if twin["of"] == trial["trial"] and twin["state"] == "done"]
        if twins:
            name = trial["trial"]
            groups[name] = [trial["value"], *(value for value in twins if value is not None)]
            diverged[name] = twins.count(None)
    best = _best(search, ended, groups, diverged)
    found = standings(groups)
    winner = next((item for item in found if best is not None and item.trial == best["trial"]), None)
    return {
        "trials": [*own, *again],
        "best": best,
        "standings": [
            {"trial": item.trial, "mean": item.mean, "half": item.half, "values": list(item.values)} for item in found
        ],
        "ties": [] if winner is None else statistical_ties(winner, found, groups),
        "front": sorted(pareto_front(search, own)),
        "ended_by": ended_by,
    }


def _best(
    search: Search, ended: Sequence[dict[str, Any]], groups: dict[str, list[float]], diverged: dict[str, int]
) -> dict[str, Any] | None:
    """By the mean over seeds, where all that were to be repeated have been; a seed without a value counts against its
    trial. Else by the first seed: one that happened to be repeated first is no better for it. `ended`: best first."""
    top = ended[: search.replicate_top_k]
    top = [trial for trial in top if trial["feasible"]] or top
    if not top or any(trial["trial"] not in groups for trial in top):
        return next(iter(ended), None)
    sign = 1 if search.mode == "min" else -1

    return min(top, key=lambda trial: (diverged[trial["trial"]], sign * mean(groups[trial["trial"]])))


def _trial(search: Search, record: JournalRecord) -> dict[str, Any]:
    ended = record.ended or {"state": "stopped", "values": {}, "seconds": None, "error": ""}
    value = value_of(search, ended["values"])
    begun = record.begun
    return {
        "trial": begun.trial,
        "overrides": begun.overrides,
        "origin": begun.origin,
        "of": begun.of,
        "state": ended["state"],
        "value": None if math.isnan(value) else value,
        "values": ended["values"],
        "feasible": feasible(search, ended["values"]),
        **{key: ended.get(key) for key in ("steps", "tokens", "rows", "seconds")},
        "error": ended["error"],
    }
