"""How far chosen rows cover the others: how near the nearest chosen row is to each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tunery.selection.candidates import Candidates, Places

COMPARED = 10_000
"""Candidates that are looked at, evenly spaced over all; fewer where so many are chosen that PRODUCTS are reached."""
PRODUCTS = 1_000_000_000
"""Cosines: seconds."""
PAIRED = 500
"""Of them, those that are compared with each other."""


def strided_sample(candidates: Candidates, chosen: int) -> Places:
    return candidates.every(max(100, min(COMPARED, PRODUCTS // max(chosen, 1))))


def coverage(candidates: Candidates, places: Places, chosen: Places) -> dict[str, Any]:
    """radius: the largest distance of one of `places` to its nearest chosen row, of vectors of length 1 (0: the same,
    1.41: nothing in common, 2: opposite); similarity: the mean cosine to it."""
    cosines = np.concatenate(
        [candidates.nearest(places[start : start + 1024], chosen)[0] for start in range(0, len(places), 1024)]
    )
    cosines = np.minimum(cosines, 1.0)
    return {"radius": float(np.sqrt(2 - 2 * cosines.min())), "similarity": math.fsum(cosines) / len(cosines)}


def chance_similarity(candidates: Candidates) -> dict[str, float] | None:
    """Median and 95th percentile of the cosine of two candidates; None where there are not two."""
    places = candidates.every(PAIRED)
    if len(places) < 2:
        return None
    rows_nh, lengths = candidates.vectors(places), np.sqrt(candidates.squares[places].astype(np.float64))
    cosines = ((rows_nh @ rows_nh.T) / lengths / lengths[:, None])[np.triu_indices(len(places), 1)]
    middle, high = np.quantile(cosines, [0.5, 0.95])
    return {"median": float(middle), "high": float(high)}
