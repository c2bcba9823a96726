"""Agreement between a filter and a reviewer, and the threshold that agrees best with the reviewer. Pure functions."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunery.ingest.corruption_metrics import Bools, Floats


def agreement(filter_keeps: Bools, person_keeps: Bools) -> dict[str, Any]:
    """Return the confusion matrix, the fraction of rows on which both agree, and Cohen's kappa.

    kappa = (p_o - p_e) / (1 - p_e), where p_e is the expected agreement of two raters who decide independently at the
    same rates (Cohen 1960, "A coefficient of agreement for nominal scales"). None if p_e is 1, because both give the
    same label to every row.
    """
    n = len(filter_keeps)
    both_keep = int((filter_keeps & person_keeps).sum())
    both_drop = int((~filter_keeps & ~person_keeps).sum())
    only_filter, only_person = int((filter_keeps & ~person_keeps).sum()), int((~filter_keeps & person_keeps).sum())
    agreed = both_keep + both_drop
    # n^2 p_e as an integer, so that the test for p_e = 1 is exact.
    by_chance = (both_keep + only_filter) * (both_keep + only_person) + (both_drop + only_person) * (
        both_drop + only_filter
    )
    return {
        "reviewed": n,
        "agreed": agreed,
        "share": agreed / n if n else None,
        "kappa": (agreed * n - by_chance) / (n * n - by_chance) if n * n != by_chance else None,
        "both_keep": both_keep,
        "both_drop": both_drop,
        "only_filter_keeps": only_filter,
        "only_person_keeps": only_person,
    }


@dataclass(frozen=True)
class AgreementThreshold:
    """Keep rows with a badness of at most `value`."""

    value: float
    agreement: float
    """Fraction of the reviewed rows on which the threshold agrees with the reviewer."""
    at_edge: bool
    """All reviewed rows are on one side of the threshold, so a looser or stricter one may agree better."""


def best_threshold(badness: Floats, person_keeps: Bools, current: float) -> AgreementThreshold | None:
    """Return the threshold on `badness` (lower is better) that agrees with the reviewer on the most rows, or None if no
    row has a score.

    Agreement changes only at the values of the rows, so it is computed once per gap between two values, in O(n log n).
    Among equally good gaps, the one that contains `current` wins and `current` is returned; otherwise the gap nearest
    to `current` wins, and a number with few digits near its middle is returned. Every threshold drops rows without a
    score (infinite badness).
    """
    finite = np.isfinite(badness)
    if not finite.any():
        return None
    values, value_indices = np.unique(badness[finite], return_inverse=True)
    kept, dropped = (
        np.bincount(value_indices, weights=mask[finite], minlength=len(values))
        for mask in (person_keeps, ~person_keeps)
    )
    # Gap g is below values[g]: a threshold in it keeps values[:g] and drops the others.
    agreed = np.concatenate([[0], np.cumsum(kept)]) + dropped.sum() - np.concatenate([[0], np.cumsum(dropped)])
    agreed += (~person_keeps[~finite]).sum()
    lows, highs = np.concatenate([[-math.inf], values]), np.concatenate([values, [math.inf]])
    contains_current = (lows <= current) & ((current < highs) | np.isinf(highs))
    with np.errstate(invalid="ignore"):  # a filter that drops nothing may have an infinite threshold
        distance = np.where(contains_current, -1.0, np.maximum(lows - current, current - highs))
    candidates = np.flatnonzero(agreed == agreed.max())
    best = int(candidates[np.argmin(distance[candidates])])
    low, high = float(lows[best]), float(highs[best])
    value = current if contains_current[best] else between(low, high)
    return AgreementThreshold(value, float(agreed[best] / len(badness)), best in (0, len(values)))


def between(low: float, high: float) -> float:
    """Return a number in [low, high) near the middle, with as few digits as possible. One end may be infinite."""
    if math.isinf(high):
        return low
    middle = math.nextafter(high, -math.inf) if math.isinf(low) else low + (high - low) / 2
    for digits in range(3, 18):
        rounded = float(f"{middle:.{digits}g}")
        if low <= rounded < high:
            return rounded
    return low
