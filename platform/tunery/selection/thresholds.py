"""Which rows a rule keeps: cuts found by passes over the score, decisions made a shard at a time. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tunery.ingest.corruption_metrics import Bools, Floats
from tunery.scoring.order_statistics import Pieces, kth_smallest
from tunery.spec import Keep


@dataclass
class Threshold:
    """A rule made ready to decide on row after row, in their order.

    `worst` is the largest badness that passes, and of the rows exactly there the first `ties` do.
    """

    worst: float
    ties: int | None
    """None: all of them."""
    low: float = -math.inf
    """The least score that passes, of a range; its other end is `worst`."""
    is_range: bool = False
    all_rows: bool = False

    def passing(self, badness: Floats) -> Bools:
        """Which of the next rows pass. NaN does only where all rows do."""
        if self.all_rows:
            return np.ones(len(badness), dtype=bool)
        if self.is_range:
            return (badness >= self.low) & (badness <= self.worst)
        passed: Bools = badness < self.worst
        at_cut = np.flatnonzero(badness == self.worst)
        if self.ties is not None:
            at_cut = at_cut[: self.ties]
            self.ties -= len(at_cut)
        passed[at_cut] = True
        return passed


def find_threshold(
    pieces: Pieces, rule: Keep, good: Literal["low", "high"], rows: int, as_many: int | None
) -> Threshold:
    """The cut of `rule` in a column of badness (the score where low is good, else its negative; a range: the score).

    `rows` is how many there are in all, `as_many` what `match_count_of` came to. Of a fraction the column holds those
    rows alone that it is of.
    """
    if rule.range is not None:
        low, high = rule.range
        return Threshold(math.inf if high is None else high, None, -math.inf if low is None else low, is_range=True)
    if rule.threshold is not None:
        return Threshold(rule.threshold if good == "low" else -rule.threshold, None)
    if rule.keep_fraction == 1:
        most = [float(np.nanmax(piece)) for piece in pieces() if not np.isnan(piece).all()]
        return Threshold(max(most, default=-math.inf), None, all_rows=True)
    usable = sum(int((~np.isnan(piece)).sum()) for piece in pieces())
    if rule.keep_fraction is not None:
        wanted = round(rule.keep_fraction * rows)
    elif rule.keep_fraction_of_rest is not None:
        wanted = round(rule.keep_fraction_of_rest * usable)
    elif rule.top_k is not None:
        wanted = rule.top_k
    else:
        assert as_many is not None, "a rule has one of the six"
        wanted = as_many
    wanted = min(wanted, usable)
    if wanted == 0:
        return Threshold(-math.inf, 0)
    worst = kth_smallest(pieces, wanted - 1)
    better = sum(int((piece < worst).sum()) for piece in pieces())
    return Threshold(worst, wanted - better)


def describe(score: str, rule: Keep) -> str:
    """The rule in words: "perplexity keep_fraction 0.8"."""
    if rule.range is not None:
        low, high = rule.range
        return f"{score} from {_end(low)} to {_end(high)}"
    if rule.match_count_of is not None:
        return f"{score} as many as {rule.match_count_of}"
    for name in ("keep_fraction", "keep_fraction_of_rest", "threshold"):
        if (value := getattr(rule, name)) is not None:
            return f"{score} {name} {value:g}"
    return f"{score} top {rule.top_k:,}"


def _end(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"


def random_scores(ids: Sequence[str], seed: int) -> Floats:
    """The score `random`: the same for the same row and seed, wherever the row stands; evenly spread over [0, 1)."""
    digests = (hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest() for row in ids)
    return np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])


class QuotaThreshold:
    """At most `rows` of each kind: found by one pass that keeps each kind's best, told by a second.

    Memory: 24 bytes a row that is kept, whatever the number of rows.
    """

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._best: dict[str, list[tuple[float, int]]] = {}
        self._kept: set[int] = set()

    def see(self, kinds: Sequence[str], badness: Floats, places: Sequence[int]) -> None:
        """Rows that pass so far; `places` are their numbers in the dataset."""
        import heapq

        for kind, bad, place in zip(kinds, badness.tolist(), places, strict=True):
            heap = self._best.setdefault(kind, [])
            # The worst is on top; of equals the one that comes last.
            item = (-math.inf if math.isnan(bad) else -bad, -place)
            if len(heap) < self._rows:
                heapq.heappush(heap, item)
            else:
                heapq.heappushpop(heap, item)

    def close(self) -> None:
        self._kept = {-place for heap in self._best.values() for _, place in heap}
        self._best = {}

    def passing(self, places: Sequence[int]) -> Bools:
        return np.array([place in self._kept for place in places], dtype=bool)
