"""The sample of rows to review: near the threshold, on both sides of it, at several distances, from every source.

Stratified sampling with equal instead of proportional allocation (Cochran, Sampling Techniques, 1977, chapter 5),
because the review measures where the filter errs, not how often, and it errs most near the threshold. The agreement on
this sample therefore does not extend to rows far from the threshold, where a filter is right more often. Pure
functions.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np

from tunery.ingest.corruption_metrics import Floats

Side = Literal["kept", "dropped"]
K = TypeVar("K", bound=Hashable)

BANDS = ("nearest", "near", "farther")
BAND_FRACTIONS = (0.02, 0.06, 0.15)
"""Distance from the threshold at which each band ends, as a fraction of all rows."""
BAND_MULTIPLES = (1, 3, 7)
"""Minimum of that distance in small datasets, as a multiple of the rows sampled per band: the bands then sample every
row, every 2nd and every 4th row."""


@dataclass(frozen=True, order=True)
class Stratum:
    side: Side
    band: str
    source: str


@dataclass(frozen=True)
class SampledRow:
    index: int
    """Index of the first row with this id."""
    id: str
    stratum: Stratum


@dataclass(frozen=True)
class Sample:
    rows: list[SampledRow]
    """In display order: shuffled, so that the position of a row does not reveal its score."""
    available: dict[Stratum, int]
    """Number of distinct rows in each stratum, sampled or not."""


def sample_rows(ids: Sequence[str], sources: Sequence[str], distance: Floats, rows: int, seed: int) -> Sample:
    """Return a sample of `rows` distinct rows, or all rows if there are fewer. Deterministic.

    Rows are allocated evenly to the two sides, then to the bands of a side, then to the sources of a band; what a
    stratum can't supply goes to the others. Within a stratum, the rows with the lowest hash of seed and id are sampled,
    so a larger sample, or a sample of slightly different data, has mostly the same rows. O(n log n).
    """
    sides: dict[Side, list[int]] = {"kept": [], "dropped": []}
    distinct_ids: set[str] = set()
    for index in np.argsort(np.abs(distance), kind="stable").tolist():
        if ids[index] not in distinct_ids:
            distinct_ids.add(ids[index])
            sides["kept" if distance[index] < 0 else "dropped"].append(index)
    strata: dict[Stratum, list[int]] = defaultdict(list)
    sampled: list[SampledRow] = []
    for side, side_size in allocate_evenly({side: len(indices) for side, indices in sides.items()}, rows).items():
        ends = _band_ends(len(ids), side_size)
        bands: dict[str, dict[str, list[int]]] = {band: defaultdict(list) for band in BANDS}
        for rank, index in enumerate(sides[side][: ends[-1]]):
            band = next(band for band, end in zip(BANDS, ends, strict=True) if rank < end)
            bands[band][sources[index]].append(index)
        band_sizes = allocate_evenly(
            {band: sum(map(len, by_source.values())) for band, by_source in bands.items()}, side_size
        )
        for band, indices_by_source in bands.items():
            by_source = dict(sorted(indices_by_source.items(), key=lambda item: _hash(seed, item[0])))
            available = {source: len(indices) for source, indices in by_source.items()}
            for source, size in allocate_evenly(available, band_sizes[band]).items():
                stratum = Stratum(side, band, source)
                strata[stratum] = by_source[source]
                lowest = sorted(by_source[source], key=lambda index: _hash(seed, ids[index]))[:size]
                sampled += [SampledRow(index, ids[index], stratum) for index in lowest]
    sampled.sort(key=lambda row: _hash(seed, f"order {row.id}"))
    return Sample(sampled, {stratum: len(indices) for stratum, indices in strata.items()})


def allocate_evenly(capacity: dict[K, int], total: int) -> dict[K, int]:
    """Allocate `total`, or the sum of the capacities if that is less, as evenly as the capacities allow; a remainder
    goes to the first keys."""
    allocation = dict.fromkeys(capacity, 0)
    remaining = min(total, sum(capacity.values()))
    open_keys = [key for key in capacity if capacity[key]]
    while remaining:
        per_key = max(1, remaining // len(open_keys))
        for key in open_keys:
            added = min(per_key, capacity[key] - allocation[key], remaining)
            allocation[key] += added
            remaining -= added
        open_keys = [key for key in open_keys if allocation[key] < capacity[key]]
    return allocation


def _band_ends(num_rows: int, side_size: int) -> list[int]:
    """Return the end of each band of one side, in rows from the threshold. The last is at least `side_size`."""
    band_size = side_size / len(BANDS)
    return [
        max(math.ceil(fraction * num_rows), math.ceil(band_size * multiple))
        for fraction, multiple in zip(BAND_FRACTIONS, BAND_MULTIPLES, strict=True)
    ]


def _hash(seed: int, text: str) -> bytes:
    return hashlib.sha256(f"{seed} {text}".encode(errors="backslashreplace")).digest()
