"""Result of a search: its trials, ranked, and the winner. No I/O, no Ray."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean
from typing import Any

from tunery.events.ranking import (
    cost,
    feasible,
    objective_value,
    pareto_front,
    rank_of,
    seed_stats,
    statistical_ties,
)
from tunery.search.journal import JournalRecord
from tunery.spec import Search


def search_facts(search: Search, records: Sequence[JournalRecord], ended_by: str) -> dict[str, Any]:
    """Return the facts of the search artifact.

    trials: best first, replicates last; each {trial, overrides, origin, of, state, value (the metric or the weighted
    sum; None if missing), values {metric: number}, feasible, steps, tokens, rows, seconds, error}. best: the winner;
    None if no trial finished. standings: for replicated trials the mean over seeds, half of its 95% confidence
    interval, and the values. ties: trials whose mean does not differ significantly from the winner's. pareto_front: the
    Pareto front. ended_by: why the search ended early.
    """
    trials = sorted((_trial_facts(search, record) for record in records), key=lambda trial: rank_of(search, trial))
    originals = [trial for trial in trials if trial["origin"] != "replicate"]
    replicates = [trial for trial in trials if trial["origin"] == "replicate"]
    finished = [trial for trial in originals if rank_of(search, trial).is_finished]
    groups: dict[str, list[float]] = {}
    num_diverged: dict[str, int] = {}
    for trial in finished:
        values = [other["value"] for other in replicates if other["of"] == trial["trial"] and other["state"] == "done"]
        if values:
            name = trial["trial"]
            groups[name] = [trial["value"], *(value for value in values if value is not None)]
            num_diverged[name] = values.count(None)
    best = _best(search, finished, groups, num_diverged)
    stats = seed_stats(groups)
    winner = next((item for item in stats if best is not None and item.trial == best["trial"]), None)
    return {
        "trials": [*originals, *replicates],
        "best": best,
        "standings": [
            {"trial": item.trial, "mean": item.mean, "ci_half_width": item.ci_half_width, "values": list(item.values)}
            for item in stats
        ],
        "ties": [] if winner is None else statistical_ties(winner, stats, groups),
        "pareto_front": sorted(pareto_front(search, originals)),
        "ended_by": ended_by,
    }


def _best(
    search: Search, finished: Sequence[dict[str, Any]], groups: dict[str, list[float]], num_diverged: dict[str, int]
) -> dict[str, Any] | None:
    """Return the trial with the best mean over seeds, if all of the top k were replicated; a seed without a value
    counts against its trial. Otherwise return the best by the first seed: being replicated first is no advantage.
    `finished` is sorted, best first."""
    top = finished[: search.replicate_top_k]
    top = [trial for trial in top if trial["feasible"]] or top
    if not top or any(trial["trial"] not in groups for trial in top):
        return next(iter(finished), None)
    return min(top, key=lambda trial: (num_diverged[trial["trial"]], cost(search.mode, mean(groups[trial["trial"]]))))


def _trial_facts(search: Search, record: JournalRecord) -> dict[str, Any]:
    outcome = record.outcome or {"state": "stopped", "values": {}, "seconds": None, "error": ""}
    value = objective_value(search, outcome["values"])
    start = record.start
    return {
        "trial": start.trial,
        "overrides": start.overrides,
        "origin": start.origin,
        "of": start.of,
        "state": outcome["state"],
        "value": None if math.isnan(value) else value,
        "values": outcome["values"],
        "feasible": feasible(search, outcome["values"]),
        **{key: outcome.get(key) for key in ("steps", "tokens", "rows", "seconds")},
        "error": outcome["error"],
    }
