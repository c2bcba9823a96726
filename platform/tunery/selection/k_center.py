"""k-center: the row farthest from the chosen ones is chosen next.

Gonzalez 1985, "Clustering to minimize the maximum intercluster distance"
(https://doi.org/10.1016/0304-3975(85)90224-5): no choice of as many rows has less than half the radius. Sener &
Savarese 2018 (https://arxiv.org/abs/1708.00489) choose training rows so.

Done plainly, each choice is a pass over all vectors. Here a pass leaves the ACTIVE rows that are farthest in memory,
and rows are chosen among them as long as the farthest is farther than any row outside can be, whose distances only
shrink; then all rows meet the new centres in one product of matrices. The choice is the plain one's, row for row.

Memory: ACTIVE vectors (64 MB at 256 dimensions), a block's distances (64 MB) and the chosen places. Time: rows x
chosen x dimensions x 2 operations, as the plain one's, but in products of matrices, and a pass over the file for some
hundred choices instead of for each. On paper, 100 M rows of 256 dimensions and 10,000 chosen: 5e14 operations, 1.4 h at
100 GFLOP/s; 100,000 chosen are 14 h, and want a filter before.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from tunery.selection.candidates import BLOCK, Candidates, FloatMatrix, Places

ACTIVE = 1 << 16
"""At most so many rows in memory between two passes; a thirty-second of all where that is less, at least LEAST."""
LEAST = 1024
SHRINK = 64
"""Choices after which rows that can't be next any more are let go."""


def k_center(
    candidates: Candidates, wanted: int, told: Callable[[int], None] = lambda chosen: None
) -> tuple[list[int], NDArray[np.float32]]:
    """The chosen places, first chosen first, and each candidate's squared distance to its nearest one, in units of
    SCALE squared; on disk.

    The first is the one nearest to the mean; of equally far ones that of the least place is taken. Fewer than wanted
    where all others lie on a chosen one.
    """
    near: NDArray[np.float32] = candidates.column("near", np.float32, np.inf)
    chosen = [_medoid(candidates)]
    fresh = list(chosen)
    while True:
        active, floor = _update_distances(candidates, np.array(fresh), near, keep=len(chosen) < wanted)
        if len(chosen) == wanted or not len(active) or near[active].max() == 0:
            return chosen, near
        fresh = _select_active(candidates, active, near[active], floor, wanted - len(chosen))
        chosen += fresh
        told(len(chosen))


def _update_distances(
    candidates: Candidates, centres: Places, near: NDArray[np.float32], keep: bool
) -> tuple[Places, float]:
    """Bring `reference` up to date with new centres, in a pass; returns the farthest rows, in their order, and the
    distance that no other row exceeds."""
    count = candidates.count
    most = max(LEAST, min(ACTIVE, count // 32))
    pieces = [centres[start : start + BLOCK] for start in range(0, len(centres), BLOCK)]
    places, far, floor = np.empty(0, np.int64), np.empty(0, np.float32), -1.0
    for block in candidates.blocks():
        rows_bh = candidates.vectors(block)
        for piece in pieces:
            _lower_distances(rows_bh, candidates.squares[block], candidates, piece, near[block])
        if keep:
            found = np.flatnonzero(near[block] > floor)
            places, far = np.concatenate([places, found + block.start]), np.concatenate([far, near[block][found]])
            if len(places) > 4 * most or (block.stop == count and len(places) > most):
                best = np.sort(np.lexsort((places, -far))[:most])
                places, far = places[best], far[best]
                floor = float(far.min())
    return places, floor


def _lower_distances(
    rows_bh: FloatMatrix, squares_b: FloatMatrix, candidates: Candidates, centres: Places, near_b: NDArray[np.float32]
) -> None:
    """Lower `near_b` to the squared distances from the centres: |a|^2 + |c|^2 - 2 ac."""
    cross_bk = rows_bh @ (candidates.vectors(centres) * np.float32(-2)).T
    cross_bk += candidates.squares[centres]
    np.minimum(near_b, cross_bk.min(axis=1) + squares_b, out=near_b)


def _select_active(
    candidates: Candidates, active: Places, near: NDArray[np.float32], floor: float, wanted: int
) -> list[int]:
    """Choices among the farthest rows, until one of the others may be farther. The first is farthest of all."""
    order = np.argsort(active)
    places, near = active[order], near[order]
    rows_ah, squares = candidates.vectors(places), candidates.squares[places]
    chosen: list[int] = []
    least = max(floor, 0.0)  # at 0 a row lies on a chosen one
    while len(chosen) < wanted:
        at = int(near.argmax())
        if near[at] <= (least if chosen else 0):
            break
        chosen.append(int(places[at]))
        distances = rows_ah @ (rows_ah[at] * np.float32(-2)) + squares + squares[at]
        np.minimum(near, distances, out=near)
        if len(chosen) % SHRINK == 0:
            still = near > least
            if 2 * still.sum() < len(still):
                places, near, rows_ah, squares = places[still], near[still], rows_ah[still], squares[still]
                if not len(places):
                    break
    return chosen


def _medoid(candidates: Candidates) -> int:
    """The place of the row nearest in direction to the sum of all: whole numbers, exact below 2,000 M rows."""
    total_h = np.zeros(candidates.dimensions)
    for block in candidates.blocks():
        total_h += candidates.vectors(block).sum(axis=0, dtype=np.float64)
    best, place = -np.inf, 0
    for block in candidates.blocks():
        towards = candidates.vectors(block).astype(np.float64) @ total_h / np.sqrt(candidates.squares[block])
        at = int(towards.argmax())
        if towards[at] > best:
            best, place = float(towards[at]), block.start + at
    return place
