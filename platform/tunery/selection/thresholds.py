"""Thresholds of keep rules: computed in passes over a score column, then applied shard by shard. Pure functions."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from tunery.ingest.corruption_metrics import Bools, Floats
from tunery.scoring.order_statistics import Chunks, kth_smallest
from tunery.spec import Keep


@dataclass
class Threshold:
    """The fitted threshold of a rule. `mask` must be called on the rows in their order, because ties are counted.

    Rows with a badness below `max_badness` pass, and the first `ties` rows with exactly that badness.
    """

    max_badness: float
    ties: int | None
    """None: all of them."""
    min_score: float = -math.inf
    """Lower end of a range; the upper end is `max_badness`."""
    is_range: bool = False
    all_rows: bool = False

    def mask(self, badness: Floats) -> Bools:
        """Return which of the next rows pass. NaN passes only if all rows do."""
        if self.all_rows:
            return np.ones(len(badness), dtype=bool)
        if self.is_range:
            return (badness >= self.min_score) & (badness <= self.max_badness)
        passed: Bools = badness < self.max_badness
        tied = np.flatnonzero(badness == self.max_badness)
        if self.ties is not None:
            tied = tied[: self.ties]
            self.ties -= len(tied)
        passed[tied] = True
        return passed


def find_threshold(
    chunks: Chunks, rule: Keep, direction: Literal["low", "high"], num_rows: int, match_count: int | None
) -> Threshold:
    """Return the threshold of `rule` in a column of badness.

    Badness is the score where low is better, else its negative; for a range it is the score. For
    `keep_fraction_of_rest` the column holds only the rows that the other rules keep. `num_rows` is the size of the
    dataset, `match_count` the number of rows of the `match_count_of` stage.
    """
    if rule.range is not None:
        low, high = rule.range
        return Threshold(math.inf if high is None else high, None, -math.inf if low is None else low, is_range=True)
    if rule.threshold is not None:
        return Threshold(rule.threshold if direction == "low" else -rule.threshold, None)
    if rule.keep_fraction == 1:
        maxima = [float(np.nanmax(chunk)) for chunk in chunks() if not np.isnan(chunk).all()]
        return Threshold(max(maxima, default=-math.inf), None, all_rows=True)
    num_scored = sum(int((~np.isnan(chunk)).sum()) for chunk in chunks())
    if rule.keep_fraction is not None:
        num_kept = round(rule.keep_fraction * num_rows)
    elif rule.keep_fraction_of_rest is not None:
        num_kept = round(rule.keep_fraction_of_rest * num_scored)
    elif rule.top_k is not None:
        num_kept = rule.top_k
    else:
        assert match_count is not None, "a rule sets exactly one of its six fields"
        num_kept = match_count
    num_kept = min(num_kept, num_scored)
    if num_kept == 0:
        return Threshold(-math.inf, 0)
    max_badness = kth_smallest(chunks, num_kept - 1)
    num_below = sum(int((chunk < max_badness).sum()) for chunk in chunks())
    return Threshold(max_badness, num_kept - num_below)


def describe(score: str, rule: Keep) -> str:
    """Return the rule as text, such as "perplexity keep_fraction 0.8"."""
    if rule.range is not None:
        low, high = rule.range
        return f"{score} from {_format_end(low)} to {_format_end(high)}"
    if rule.match_count_of is not None:
        return f"{score} as many as {rule.match_count_of}"
    for name in ("keep_fraction", "keep_fraction_of_rest", "threshold"):
        if (value := getattr(rule, name)) is not None:
            return f"{score} {name} {value:g}"
    return f"{score} top {rule.top_k:,}"


def _format_end(value: float | None) -> str:
    return "any" if value is None else f"{value:g}"


def random_scores(ids: Sequence[str], seed: int) -> Floats:
    """Return the score `random`, uniform over [0, 1). It depends only on the row id and the seed, not on the position
    of the row."""
    digests = (hashlib.blake2b(f"{seed} {row}".encode(), digest_size=8).digest() for row in ids)
    return np.array([int.from_bytes(digest, "big") / 2**64 for digest in digests])


class QuotaThreshold:
    """At most `rows_per_group` rows of each group: `add` in a first pass over the rows, `mask` in a second.

    Memory: 24 bytes per kept row, whatever the number of rows.
    """

    def __init__(self, rows_per_group: int) -> None:
        self._rows_per_group = rows_per_group
        self._heaps: dict[str, list[tuple[float, int]]] = {}
        self._kept: set[int] = set()

    def add(self, groups: Sequence[str], badness: Floats, indices: Sequence[int]) -> None:
        """Add rows that pass the rules; `indices` are their row numbers in the dataset."""
        for group, row_badness, index in zip(groups, badness.tolist(), indices, strict=True):
            heap = self._heaps.setdefault(group, [])
            # The worst row is on top; in a tie the row that comes last.
            item = (-math.inf if math.isnan(row_badness) else -row_badness, -index)
            if len(heap) < self._rows_per_group:
                heapq.heappush(heap, item)
            else:
                heapq.heappushpop(heap, item)

    def finalize(self) -> None:
        self._kept = {-negative_index for heap in self._heaps.values() for _, negative_index in heap}
        self._heaps = {}

    def mask(self, indices: Sequence[int]) -> Bools:
        return np.array([index in self._kept for index in indices], dtype=bool)
