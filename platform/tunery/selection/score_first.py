"""Score first, diversity aware: best score first, less what is too similar to a row taken before.

Liu et al. 2024, "What Makes Good Data for Alignment?" (DEITA, https://arxiv.org/abs/2312.15685), section 2.4.

Memory: a block of rows and a block of taken ones, and the taken places; the order by score goes through files. Time:
rows looked at x taken x dimensions x 2 operations; it ends when enough are taken. On paper, 100 M rows of 256
dimensions of which 100,000 are to be taken, and half of those looked at are: 200,000 x 100,000 / 2 x 512 = 5e12
operations, a minute at 100 GFLOP/s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunery.ingest.corruption_metrics import Floats
from tunery.scoring.scorers.external_groupby import RECORDS, PartitionFiles
from tunery.selection.candidates import Candidates, Places

MAX_CANDIDATES = 1024
"""Rows that meet the taken ones together."""
SAMPLE = 100_000
"""Scores by which rows are parted before they are sorted."""
ROUNDING = 1e-9
"""Of a cosine: two equal rows have 1 and a bit."""


@dataclass(frozen=True)
class GreedySelection:
    chosen: list[int]
    """Places, best first."""
    rival: NDArray[np.int64]
    """By place, the taken row that this one is too similar to; -1 where there is none. On disk."""
    similarity: NDArray[np.float32]
    """To it."""


def score_first(
    candidates: Candidates,
    wanted: int,
    similarity: float,
    work: Path,
    told: Callable[[int], None] = lambda looked_at: None,
) -> GreedySelection:
    """At most so many, no two of them more similar than `similarity`; of equal scores the row that comes first."""
    rival = candidates.column("rival", np.int64, -1)
    cosine = candidates.column("cosine", np.float32, np.nan)
    chosen: list[int] = []
    looked_at = 0
    for places in _in_blocks(by_score(candidates.badness, work)):
        most, where = candidates.nearest(places, chosen)
        names = np.array(chosen, np.int64)[where] if chosen else where
        open_rows = np.flatnonzero(most <= similarity + ROUNDING)
        within_ob = _cosines(candidates, places[open_rows], places)
        taken = np.zeros(len(places), dtype=np.bool_)
        for number, index in enumerate(open_rows.tolist()):
            if len(chosen) == wanted:
                break
            if most[index] > similarity + ROUNDING:  # to one that was taken from this block
                continue
            taken[index] = True
            chosen.append(int(places[index]))
            closer = within_ob[number] > most
            closer[:index] = False  # those were looked at before it
            most[closer], names[closer] = within_ob[number][closer], places[index]
        full = len(chosen) == wanted
        seen = ~taken
        if full:
            seen[np.flatnonzero(taken)[-1] + 1 :] = False
        rival[places[seen]], cosine[places[seen]] = names[seen], most[seen]
        if full:
            break
        looked_at += len(places)
        told(looked_at)
    return GreedySelection(chosen, rival, cosine)


def _cosines(candidates: Candidates, some: Places, places: Places) -> Floats:
    """Of each of `some` to each of `places`."""
    lengths_s, lengths_b = (np.sqrt(candidates.squares[at].astype(np.float64)) for at in (some, places))
    found: Floats = (candidates.vectors(some) @ candidates.vectors(places).T) / lengths_b / lengths_s[:, None]
    return found


def by_score(badness: Floats, work: Path) -> Iterator[Places]:
    """All places, the least badness first, of equals the least place; so many at a time as are sorted in memory.

    A sample says where to part the scores, so a part holds some RECORDS; of one score that very many rows have, all
    rows are in one: 16 bytes each.
    """
    count = len(badness)
    if count <= RECORDS:
        yield np.argsort(badness, kind="stable")
        return
    sample = np.sort(badness[:: max(1, count // SAMPLE)])
    parts = -(-count // RECORDS)
    edges = np.unique(sample[np.arange(1, parts) * len(sample) // parts])
    files = PartitionFiles(work / "order", {"badness": "<f8", "place": "<i8"})
    for start in range(0, count, RECORDS):
        piece = np.asarray(badness[start : start + RECORDS])
        part = np.searchsorted(edges, piece, side="right")
        files.append(part, badness=piece, place=np.arange(start, start + len(piece)))
    for number in range(len(edges) + 1):
        records = files.read(number)
        yield records["place"][np.argsort(records["badness"], kind="stable")].astype(np.int64)
        files.drop(number)


def _in_blocks(pieces: Iterator[Places]) -> Iterator[Places]:
    for piece in pieces:
        for start in range(0, len(piece), MAX_CANDIDATES):
            yield piece[start : start + MAX_CANDIDATES]
