"""How well a score or a filter tells planted rows from intact ones. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunery.models.metrics import auc

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def auc_by_kind(badness: Floats, planted: Sequence[str]) -> dict[str, float]:
    """AUC of each kind of damage against the intact rows."""
    kinds = np.array(planted)
    result: dict[str, float] = {}
    for kind in sorted(set(planted) - {""}):
        among = (kinds == kind) | (kinds == "")
        value = auc(badness[among], kinds[among] == kind)
        if value is not None:
            result[kind] = value
    return result


CorruptionMetrics = tuple[Floats, Bools | None]
"""Scores, and which of them are of planted rows where that is known."""


def histogram(pieces: Callable[[], Iterable[CorruptionMetrics]], bins: int = 40) -> dict[str, list[float]]:
    """Counts over evenly spaced bins, in two passes: {"edges", "counts", "planted"}.

    A score that is positive and spreads over more than a factor of ten is spaced by its logarithm (perplexity); others
    (shares, counts) linearly. What is not finite is left out.
    """
    low, high = math.inf, -math.inf
    for values, _ in pieces():
        finite = values[np.isfinite(values)]
        if len(finite):
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:
        return {"edges": [], "counts": [], "planted": []}
    edges = _edges(low, high, bins)
    counts, planted = np.zeros(bins, dtype=int), np.zeros(bins, dtype=int)
    for values, bad in pieces():
        counts += np.histogram(values, edges)[0]
        if bad is not None:
            planted += np.histogram(values[bad], edges)[0]
    return {"edges": edges.tolist(), "counts": counts.tolist(), "planted": planted.tolist()}


def _edges(low: float, high: float, bins: int) -> Floats:
    logarithmic = low > 0 and high > 10 * low
    if logarithmic:
        edges = np.geomspace(low, high, bins + 1)
    else:
        edges = np.linspace(low, high if high > low else low + max(abs(low), 1.0) * 1e-4, bins + 1)
    edges[0], edges[-1] = low, max(high, edges[-1])
    return edges


def filter_quality(dropped: Bools, badness: Floats | None, planted: Sequence[str]) -> dict[str, Any]:
    """Precision and recall of the dropped rows as a finding of the planted ones, beside a random filter's.

    A random filter that drops as many rows finds planted ones at their rate among all: precision is that rate, recall
    the share of rows that it drops. Those are its exact expectations, not one draw.
    """
    bad = np.array([kind != "" for kind in planted])
    total, n_dropped, hits = int(bad.sum()), int(dropped.sum()), int((dropped & bad).sum())
    kinds = np.array(planted)
    return {
        "total": total,
        "dropped": hits,
        "precision": hits / n_dropped if n_dropped else None,
        "recall": hits / total if total else None,
        "recall_by_kind": {kind: float(dropped[kinds == kind].mean()) for kind in sorted(set(planted) - {""})},
        "auc": auc(badness, bad) if badness is not None else None,
        "random_precision": total / len(bad),
        "random_recall": n_dropped / len(bad),
    }
