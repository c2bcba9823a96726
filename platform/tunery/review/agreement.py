"""How far a filter and a person agree, and the threshold that would agree best. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from tunery.ingest.corruption_metrics import Bools, Floats


def agreement(filter_keeps: Bools, person_keeps: Bools) -> dict[str, Any]:
    """Counts of the four cases, the share of rows on which both say the same, and Cohen's kappa.

    kappa = (p_o - p_e) / (1 - p_e), p_e the agreement of two who decide by chance at the same rates (Cohen 1960, "A
    coefficient of agreement for nominal scales"). None where nobody could disagree: both say one thing of every row.
    """
    n = len(filter_keeps)
    both_keep = int((filter_keeps & person_keeps).sum())
    both_drop = int((~filter_keeps & ~person_keeps).sum())
    only_filter, only_person = int((filter_keeps & ~person_keeps).sum()), int((~filter_keeps & person_keeps).sum())
    agreed = both_keep + both_drop
    # In whole numbers, so that "nobody could disagree" is no question of rounding.
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
    """Keep what is not worse than `value`."""

    value: float
    agreement: float
    """Share of the reviewed rows."""
    at_edge: bool
    """All reviewed rows are on one side of it: an even looser or stricter one may agree better."""


def best_threshold(badness: Floats, person_keeps: Bools, now: float) -> AgreementThreshold | None:
    """The threshold on `badness` (low is good) that agrees with the person on most rows.

    Agreement only changes at the values of the rows, so it is counted once for each gap between two of them: O(n log
    n) for sorting, then one sum. Of equally good gaps the one with `now` in it wins (then `now` is the answer: no
    reason to move), else the one nearest to `now`; in it, the roundest number near its middle. Rows without a score
    (infinite) are dropped by every threshold. None when no row has a score.
    """
    finite = np.isfinite(badness)
    if not finite.any():
        return None
    values, place = np.unique(badness[finite], return_inverse=True)
    kept, dropped = (
        np.bincount(place, weights=says[finite], minlength=len(values)) for says in (person_keeps, ~person_keeps)
    )
    # Gap g lies below values[g]: the values before it are kept, the others dropped.
    agreed = np.concatenate([[0], np.cumsum(kept)]) + dropped.sum() - np.concatenate([[0], np.cumsum(dropped)])
    agreed += (~person_keeps[~finite]).sum()
    lows, highs = np.concatenate([[-math.inf], values]), np.concatenate([values, [math.inf]])
    inside = (lows <= now) & ((now < highs) | np.isinf(highs))
    with np.errstate(invalid="ignore"):  # a filter that drops nothing may have its cut at infinity
        away = np.where(inside, -1.0, np.maximum(lows - now, now - highs))
    candidates = np.flatnonzero(agreed == agreed.max())
    best = int(candidates[np.argmin(away[candidates])])
    low, high = float(lows[best]), float(highs[best])
    value = now if inside[best] else between(low, high)
    return AgreementThreshold(value, float(agreed[best] / len(badness)), best in (0, len(values)))


def between(low: float, high: float) -> float:
    """A number in [low, high), with as few digits as tell it apart, near the middle. One end may be infinite."""
    if math.isinf(high):
        return low
    middle = math.nextafter(high, -math.inf) if math.isinf(low) else low + (high - low) / 2
    for digits in range(3, 18):
        rounded = float(f"{middle:.{digits}g}")
        if low <= rounded < high:
            return rounded
    return low
