"""Metrics of how well a score or a filter separates corrupted rows from intact ones. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunery.models.metrics import auc

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


def auc_by_kind(badness: Floats, corruption_kinds: Sequence[str]) -> dict[str, float]:
    """Return the AUC of each kind of corruption against the intact rows (kind "")."""
    kinds = np.array(corruption_kinds)
    result: dict[str, float] = {}
    for kind in sorted(set(corruption_kinds) - {""}):
        kind_or_intact = (kinds == kind) | (kinds == "")
        value = auc(badness[kind_or_intact], kinds[kind_or_intact] == kind)
        if value is not None:
            result[kind] = value
    return result


LabeledScores = tuple[Floats, Bools | None]
"""Scores, and a mask of the corrupted rows if it is known."""


def histogram(chunks: Callable[[], Iterable[LabeledScores]], bins: int = 40) -> dict[str, list[float]]:
    """Return a histogram, computed in two passes: {"edges", "counts", "corrupted" (counts of corrupted rows)}.

    Bins are spaced logarithmically if the scores are positive and span more than a factor of ten (perplexity), else
    linearly (fractions, counts). Non-finite scores are not counted.
    """
    low, high = math.inf, -math.inf
    for values, _ in chunks():
        finite = values[np.isfinite(values)]
        if len(finite):
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:
        return {"edges": [], "counts": [], "corrupted": []}
    edges = _edges(low, high, bins)
    counts, corrupted_counts = np.zeros(bins, dtype=int), np.zeros(bins, dtype=int)
    for values, is_corrupted in chunks():
        counts += np.histogram(values, edges)[0]
        if is_corrupted is not None:
            corrupted_counts += np.histogram(values[is_corrupted], edges)[0]
    return {"edges": edges.tolist(), "counts": counts.tolist(), "corrupted": corrupted_counts.tolist()}


def _edges(low: float, high: float, bins: int) -> Floats:
    logarithmic = low > 0 and high > 10 * low
    if logarithmic:
        edges = np.geomspace(low, high, bins + 1)
    else:
        edges = np.linspace(low, high if high > low else low + max(abs(low), 1.0) * 1e-4, bins + 1)
    edges[0], edges[-1] = low, max(high, edges[-1])
    return edges


def filter_quality(dropped: Bools, badness: Floats | None, corruption_kinds: Sequence[str]) -> dict[str, Any]:
    """Return precision and recall of `dropped` as a detector of corrupted rows, and those of a random filter.

    The values of a random filter that drops the same number of rows are exact expectations, not one sample: its
    precision is the fraction of corrupted rows, its recall the fraction of rows it drops.
    """
    is_corrupted = np.array([kind != "" for kind in corruption_kinds])
    num_corrupted, num_dropped = int(is_corrupted.sum()), int(dropped.sum())
    true_positives = int((dropped & is_corrupted).sum())
    kinds = np.array(corruption_kinds)
    return {
        "total": num_corrupted,
        "dropped": true_positives,
        "precision": true_positives / num_dropped if num_dropped else None,
        "recall": true_positives / num_corrupted if num_corrupted else None,
        "recall_by_kind": {kind: float(dropped[kinds == kind].mean()) for kind in sorted(set(corruption_kinds) - {""})},
        "auc": auc(badness, is_corrupted) if badness is not None else None,
        "random_precision": num_corrupted / len(is_corrupted),
        "random_recall": num_dropped / len(is_corrupted),
    }
