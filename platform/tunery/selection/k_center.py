"""Greedy k-center selection: the next row is the one farthest from all selected rows.

Gonzalez 1985, "Clustering to minimize the maximum intercluster distance"
(https://doi.org/10.1016/0304-3975(85)90224-5): no selection of the same size has less than half the radius. Sener &
Savarese 2018 (https://arxiv.org/abs/1708.00489) select training rows this way.

The plain algorithm makes one pass over all vectors for each selected row. Here a pass loads the MAX_ACTIVE_ROWS
farthest rows into memory. Rows are selected among them as long as the farthest active row is farther than any row
outside can be, because distances only shrink. Then one matrix product updates the distances of all rows to the new
centers. The result is identical to that of the plain algorithm, row for row.

Memory: MAX_ACTIVE_ROWS vectors (64 MB at 256 dimensions), the distances of one block (64 MB) and the selected indices.
Time: rows x selected x dimensions x 2 operations, the same as the plain algorithm, but in matrix products, and with one
pass over the file for some hundred selected rows instead of one for each. Estimate: 100 M rows of 256 dimensions and
10,000 selected rows take 5e14 operations, or 1.4 h at 100 GFLOP/s; 100,000 selected rows take 14 h, so filter first.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tunery.selection.candidates import BLOCK_SIZE, Candidates, FloatMatrix, Indices

MAX_ACTIVE_ROWS = 1 << 16
"""Maximum number of active rows in memory. With fewer than 32 x MAX_ACTIVE_ROWS candidates, a thirty-second of the
candidates is active, and at least MIN_ACTIVE_ROWS."""
MIN_ACTIVE_ROWS = 1024
PRUNE_INTERVAL = 64
"""Number of selected rows after which active rows that can no longer be the farthest are removed."""


def k_center(
    candidates: Candidates, k: int, on_progress: Callable[[int], None] = lambda num_selected: None
) -> tuple[list[int], NDArray[np.float32]]:
    """Return the selected indices in order of selection, and the squared distance of each candidate to its nearest
    selected row, in units of SCALE squared, as a memory-mapped array.

    The first selected row is the medoid. Ties go to the lowest index. Returns fewer than `k` rows if every other row
    equals a selected one. `on_progress` is called with the number of rows selected so far.
    """
    distances: NDArray[np.float32] = candidates.column("near", np.float32, np.inf)
    selected = [_medoid(candidates)]
    new_centers = list(selected)
    while True:
        active, bound = _update_distances(candidates, np.array(new_centers), distances, find_active=len(selected) < k)
        if len(selected) == k or not len(active) or distances[active].max() == 0:
            return selected, distances
        new_centers = _select_active(candidates, active, distances[active], bound, k - len(selected))
        selected += new_centers
        on_progress(len(selected))


def _update_distances(
    candidates: Candidates, centers: Indices, distances: NDArray[np.float32], find_active: bool
) -> tuple[Indices, float]:
    """Update `distances` with the new centers in one pass.

    Return the indices of the farthest rows, ascending, and an upper bound on the distance of every other row.
    """
    count = candidates.count
    max_active = max(MIN_ACTIVE_ROWS, min(MAX_ACTIVE_ROWS, count // 32))
    center_chunks = [centers[start : start + BLOCK_SIZE] for start in range(0, len(centers), BLOCK_SIZE)]
    active, active_distances, bound = np.empty(0, np.int64), np.empty(0, np.float32), -1.0
    for block in candidates.blocks():
        rows_bh = candidates.vectors(block)
        for chunk in center_chunks:
            _lower_distances(rows_bh, candidates.squares[block], candidates, chunk, distances[block])
        if find_active:
            farther = np.flatnonzero(distances[block] > bound)
            active = np.concatenate([active, farther + block.start])
            active_distances = np.concatenate([active_distances, distances[block][farther]])
            if len(active) > 4 * max_active or (block.stop == count and len(active) > max_active):
                farthest = np.sort(np.lexsort((active, -active_distances))[:max_active])
                active, active_distances = active[farthest], active_distances[farthest]
                bound = float(active_distances.min())
    return active, bound


def _lower_distances(
    rows_bh: FloatMatrix,
    squares_b: FloatMatrix,
    candidates: Candidates,
    centers: Indices,
    distances_b: NDArray[np.float32],
) -> None:
    """Lower `distances_b` in place to the squared distances to the centers: |a|^2 + |c|^2 - 2 ac."""
    cross_bk = rows_bh @ (candidates.vectors(centers) * np.float32(-2)).T
    cross_bk += candidates.squares[centers]
    np.minimum(distances_b, cross_bk.min(axis=1) + squares_b, out=distances_b)


def _select_active(
    candidates: Candidates, active: Indices, distances: NDArray[np.float32], bound: float, max_selected: int
) -> list[int]:
    """Select rows among the active ones until an inactive row (distance at most `bound`) may be farther.

    The first selected row is the farthest of all candidates.
    """
    order = np.argsort(active)
    indices, distances = active[order], distances[order]
    rows_ah, squares = candidates.vectors(indices), candidates.squares[indices]
    selected: list[int] = []
    min_distance = max(bound, 0.0)  # at 0 a row equals a selected one
    while len(selected) < max_selected:
        farthest = int(distances.argmax())
        if distances[farthest] <= (min_distance if selected else 0):
            break
        selected.append(int(indices[farthest]))
        to_farthest = rows_ah @ (rows_ah[farthest] * np.float32(-2)) + squares + squares[farthest]
        np.minimum(distances, to_farthest, out=distances)
        if len(selected) % PRUNE_INTERVAL == 0:
            eligible = distances > min_distance
            if 2 * eligible.sum() < len(eligible):
                indices, distances = indices[eligible], distances[eligible]
                rows_ah, squares = rows_ah[eligible], squares[eligible]
                if not len(indices):
                    break
    return selected


def _medoid(candidates: Candidates) -> int:
    """Return the index of the row nearest in direction to the sum of all rows.

    The sum is over whole numbers and exact below 2,000 M rows.
    """
    total_h = np.zeros(candidates.dimensions)
    for block in candidates.blocks():
        total_h += candidates.vectors(block).sum(axis=0, dtype=np.float64)
    best_projection, best_index = -np.inf, 0
    for block in candidates.blocks():
        projections = candidates.vectors(block).astype(np.float64) @ total_h / np.sqrt(candidates.squares[block])
        index = int(projections.argmax())
        if projections[index] > best_projection:
            best_projection, best_index = float(projections[index]), block.start + index
    return best_index
