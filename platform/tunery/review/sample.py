"""Which rows a person is asked about: near the cut, on both sides of it, at several distances, from every source.

Stratified sampling with equal shares (Cochran, Sampling Techniques, 1977, chapter 5), not proportional ones: what is
asked is where the filter errs, not how often, and that is at the cut. So an agreement on this sample says nothing of
rows far from the cut, where a filter is right more often. Pure.
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
SHARES = (0.02, 0.06, 0.15)
"""How far each band reaches from the cut, as a share of all rows ..."""
DENSITIES = (1, 3, 7)
"""... and in small data as a multiple of the rows asked for in a band: all, then every 2nd, then every 4th row."""


@dataclass(frozen=True, order=True)
class Stratum:
    side: Side
    band: str
    source: str


@dataclass(frozen=True)
class SampledRow:
    """`index`: of the row in the data, the first of those with its id."""

    index: int
    id: str
    stratum: Stratum


@dataclass(frozen=True)
class Sample:
    rows: list[SampledRow]
    """In the order that they are shown in: mixed, so that a row's place tells nothing of its score."""
    available: dict[Stratum, int]
    """Different rows in each stratum, asked about or not."""


def sample_rows(ids: Sequence[str], sources: Sequence[str], distance: Floats, rows: int, seed: int) -> Sample:
    """`rows` different rows, or all there are. The same arguments give the same sample.

    Shares are equal: over the sides, then over a side's bands, then over a band's sources; what a stratum is short of
    goes to the others. Within a stratum the rows are those with the lowest hash of seed and id, so that of slightly
    other data, or of a larger sample, most of the same rows are asked about. O(n log n).
    """
    sides: dict[Side, list[int]] = {"kept": [], "dropped": []}
    seen: set[str] = set()
    for index in np.argsort(np.abs(distance), kind="stable").tolist():
        if ids[index] not in seen:
            seen.add(ids[index])
            sides["kept" if distance[index] < 0 else "dropped"].append(index)
    strata: dict[Stratum, list[int]] = defaultdict(list)
    drawn: list[SampledRow] = []
    for side, quota in allocate_evenly({side: len(found) for side, found in sides.items()}, rows).items():
        ends = _ends(len(ids), quota)
        bands: dict[str, dict[str, list[int]]] = {band: defaultdict(list) for band in BANDS}
        for place, index in enumerate(sides[side][: ends[-1]]):
            band = next(band for band, end in zip(BANDS, ends, strict=True) if place < end)
            bands[band][sources[index]].append(index)
        quotas = allocate_evenly({band: sum(map(len, found.values())) for band, found in bands.items()}, quota)
        for band, found in bands.items():
            by_source = dict(sorted(found.items(), key=lambda item: _chance(seed, item[0])))
            for source, share in allocate_evenly(
                {key: len(rows) for key, rows in by_source.items()}, quotas[band]
            ).items():
                stratum = Stratum(side, band, source)
                strata[stratum] = by_source[source]
                first = sorted(by_source[source], key=lambda index: _chance(seed, ids[index]))[:share]
                drawn += [SampledRow(index, ids[index], stratum) for index in first]
    drawn.sort(key=lambda row: _chance(seed, f"order {row.id}"))
    return Sample(drawn, {stratum: len(found) for stratum, found in strata.items()})


def allocate_evenly(room: dict[K, int], total: int) -> dict[K, int]:
    """`total`, or as much as there is room for, in shares as equal as the room allows; what can't be halved goes to
    those that come first."""
    shares = dict.fromkeys(room, 0)
    left = min(total, sum(room.values()))
    open_ = [key for key in room if room[key]]
    while left:
        each = max(1, left // len(open_))
        for key in open_:
            more = min(each, room[key] - shares[key], left)
            shares[key] += more
            left -= more
        open_ = [key for key in open_ if shares[key] < room[key]]
    return shares


def _ends(n: int, quota: int) -> list[int]:
    """Where each band of one side ends, in rows from the cut. The last is never below `quota`."""
    each = quota / len(BANDS)
    return [
        max(math.ceil(share * n), math.ceil(each * density)) for share, density in zip(SHARES, DENSITIES, strict=True)
    ]


def _chance(seed: int, what: str) -> bytes:
    return hashlib.sha256(f"{seed} {what}".encode(errors="backslashreplace")).digest()
