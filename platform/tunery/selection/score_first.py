"""Score-first, diversity-aware selection: best score first, skipping rows too similar to an already selected row.

Liu et al. 2024, "What Makes Good Data for Alignment?" (DEITA, https://arxiv.org/abs/2312.15685), section 2.4.

Memory: a block of rows, a block of selected rows, and the selected indices; sorting by score goes through files. Time:
rows examined x selected x dimensions x 2 operations; it stops once enough rows are selected. Estimate: selecting
100,000 of 100 M rows of 256 dimensions when every second examined row is selected takes 200,000 x 100,000 / 2 x 512 =
5e12 operations, a minute at 100 GFLOP/s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunery.ingest.corruption_metrics import Floats
from tunery.scoring.scorers.external_groupby import MAX_RECORDS, PartitionFiles
from tunery.selection.candidates import Candidates, Indices

BATCH_SIZE = 1024
"""Number of rows compared with the selected ones at a time."""
EDGE_SAMPLE_SIZE = 100_000
"""Number of scores sampled to find the partition edges of the external sort."""
COSINE_TOLERANCE = 1e-9
"""The computed cosine of two equal rows can exceed 1 by rounding."""


@dataclass(frozen=True)
class GreedySelection:
    selected: list[int]
    """Candidate indices, best first."""
    nearest_selected: NDArray[np.int64]
    """For each candidate, the selected row that it is too similar to, or -1. Memory-mapped."""
    similarity: NDArray[np.float32]
    """Cosine to the row of `nearest_selected`. Memory-mapped."""


def score_first(
    candidates: Candidates,
    max_selected: int,
    max_similarity: float,
    work_dir: Path,
    on_progress: Callable[[int], None] = lambda num_examined: None,
) -> GreedySelection:
    """Select at most `max_selected` rows, no two of them more similar than `max_similarity`; ties in the score go to
    the lowest index."""
    nearest_selected = candidates.column("rival", np.int64, -1)
    similarity = candidates.column("cosine", np.float32, np.nan)
    selected: list[int] = []
    num_examined = 0
    for indices in _batches(sort_by_score(candidates.badness, work_dir)):
        max_cosines, positions = candidates.nearest(indices, selected)
        nearest = np.array(selected, np.int64)[positions] if selected else positions
        open_rows = np.flatnonzero(max_cosines <= max_similarity + COSINE_TOLERANCE)
        within_ob = _cosines(candidates, indices[open_rows], indices)
        is_selected = np.zeros(len(indices), dtype=np.bool_)
        for open_position, index in enumerate(open_rows.tolist()):
            if len(selected) == max_selected:
                break
            if max_cosines[index] > max_similarity + COSINE_TOLERANCE:  # to a row selected from this batch
                continue
            is_selected[index] = True
            selected.append(int(indices[index]))
            closer = within_ob[open_position] > max_cosines
            closer[:index] = False  # those were examined before it
            max_cosines[closer], nearest[closer] = within_ob[open_position][closer], indices[index]
        full = len(selected) == max_selected
        rejected = ~is_selected
        if full:
            rejected[np.flatnonzero(is_selected)[-1] + 1 :] = False
        nearest_selected[indices[rejected]] = nearest[rejected]
        similarity[indices[rejected]] = max_cosines[rejected]
        if full:
            break
        num_examined += len(indices)
        on_progress(num_examined)
    return GreedySelection(selected, nearest_selected, similarity)


def _cosines(candidates: Candidates, indices: Indices, others: Indices) -> Floats:
    """Return the cosines, (len(indices), len(others))."""
    lengths_m, lengths_k = (np.sqrt(candidates.squares[rows].astype(np.float64)) for rows in (indices, others))
    cosines: Floats = (candidates.vectors(indices) @ candidates.vectors(others).T) / lengths_k / lengths_m[:, None]
    return cosines


def sort_by_score(badness: Floats, work_dir: Path) -> Iterator[Indices]:
    """Yield all indices by ascending badness, then ascending index, in chunks that fit in memory.

    An external sort: a sample gives the edges that split the scores into partitions of about MAX_RECORDS rows. Rows
    with the same score are always in one partition, at 16 bytes a row.
    """
    count = len(badness)
    if count <= MAX_RECORDS:
        yield np.argsort(badness, kind="stable")
        return
    sample = np.sort(badness[:: max(1, count // EDGE_SAMPLE_SIZE)])
    num_partitions = -(-count // MAX_RECORDS)
    edges = np.unique(sample[np.arange(1, num_partitions) * len(sample) // num_partitions])
    files = PartitionFiles(work_dir / "order", {"badness": "<f8", "index": "<i8"})
    for start in range(0, count, MAX_RECORDS):
        chunk = np.asarray(badness[start : start + MAX_RECORDS])
        partition = np.searchsorted(edges, chunk, side="right")
        files.append(partition, badness=chunk, index=np.arange(start, start + len(chunk)))
    for number in range(len(edges) + 1):
        records = files.read(number)
        yield records["index"][np.argsort(records["badness"], kind="stable")].astype(np.int64)
        files.drop(number)


def _batches(chunks: Iterator[Indices]) -> Iterator[Indices]:
    for chunk in chunks:
        for start in range(0, len(chunk), BATCH_SIZE):
            yield chunk[start : start + BATCH_SIZE]
