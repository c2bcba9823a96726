"""Coverage of a dataset by its selected rows: how similar each row is to its nearest selected row."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from tunery.selection.candidates import Candidates, Indices

MAX_SAMPLE_SIZE = 10_000
"""Maximum number of evenly spaced candidates that coverage is measured on. The sample is smaller if MAX_COSINES would
be exceeded."""
MAX_COSINES = 1_000_000_000
"""Maximum number of cosines computed; this many take seconds."""
PAIR_SAMPLE_SIZE = 500
"""Number of candidates that are compared with each other."""


def strided_sample(candidates: Candidates, num_selected: int) -> Indices:
    """Return evenly spaced candidate indices to measure the coverage of `num_selected` rows on."""
    return candidates.strided_sample(max(100, min(MAX_SAMPLE_SIZE, MAX_COSINES // max(num_selected, 1))))


def coverage(candidates: Candidates, indices: Indices, selected: Indices) -> dict[str, Any]:
    """Return the coverage of the rows at `indices` by the `selected` rows.

    radius: the largest distance of a row to its nearest selected row, between vectors of length 1 (0: identical,
    1.41: orthogonal, 2: opposite); similarity: the mean cosine to the nearest selected row.
    """
    cosines = np.concatenate(
        [candidates.nearest(indices[start : start + 1024], selected)[0] for start in range(0, len(indices), 1024)]
    )
    cosines = np.minimum(cosines, 1.0)
    return {"radius": float(np.sqrt(2 - 2 * cosines.min())), "similarity": math.fsum(cosines) / len(cosines)}


def chance_similarity(candidates: Candidates) -> dict[str, float] | None:
    """Return the median and 95th percentile of the cosine between two candidates, or None with fewer than two."""
    indices = candidates.strided_sample(PAIR_SAMPLE_SIZE)
    if len(indices) < 2:
        return None
    rows_nh, lengths = candidates.vectors(indices), np.sqrt(candidates.squares[indices].astype(np.float64))
    cosines = ((rows_nh @ rows_nh.T) / lengths / lengths[:, None])[np.triu_indices(len(indices), 1)]
    median, percentile_95 = np.quantile(cosines, [0.5, 0.95])
    return {"median": float(median), "high": float(percentile_95)}
