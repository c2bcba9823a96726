"""What came out of a search: its trials, best first, and who won. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from tunery.search.journal import Record
from tunery.search.ranking import feasible, pareto_front, rank, standings, tied, value_of
from tunery.spec import Search


def facts_of(search: Search, records: Sequence[Record], ended_by: str) -> dict[str, Any]:
    """trials: best first, those that repeat another after them; each {trial, overrides, origin, of, state, value (the
    metric, or the weighted sum; null without one), values {metric: number}, feasible, steps, tokens, rows, seconds,
    error}. best: the winner, null when no trial ran to its end. standings: of those that were repeated mean, half of
    the 95% interval and values over seeds. ties: whose mean can't be told from the winner's. front: the Pareto front.
    ended_by: what ended the search early."""
    trials = sorted((_trial(search, record) for record in records), key=lambda trial: rank(search, trial))
    own = [trial for trial in trials if trial["origin"] != "replicate"]
    again = [trial for trial in trials if trial["origin"] == "replicate"]
    groups: dict[str, list[float]] = {}
    for trial in own:
        values = [twin["value"] for twin in again if twin["of"] == trial["trial"] and twin["state"] == "done"]
        if values and not rank(search, trial)[0]:
            groups[trial["trial"]] = [trial["value"], *values]
    best = next((trial for trial in own if not rank(search, trial)[0]), None)
    if groups:
        repeated = [trial for trial in own if trial["trial"] in groups]
        sign = 1 if search.mode == "min" else -1
        best = min(repeated, key=lambda trial: (not trial["feasible"], sign * mean(groups[trial["trial"]])))
    found = standings(groups)
    winner = next((item for item in found if best is not None and item.trial == best["trial"]), None)
    return {
        "trials": [*own, *again],
        "best": best,
        "standings": [
            {"trial": item.trial, "mean": item.mean, "half": item.half, "values": list(item.values)} for item in found
        ],
        "ties": [] if winner is None else tied(winner, found, groups),
        "front": sorted(pareto_front(search, own)),
        "ended_by": ended_by,
    }


def _trial(search: Search, record: Record) -> dict[str, Any]:
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
