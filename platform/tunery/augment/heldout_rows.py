"""Lookup of held-out rows by id and by group, because a group must not be in two splits.

Groups are compared after normalization of case, white space and Unicode composition. Memory: 16 bytes per held-out row.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from tunery.ingest.corruption_metrics import Bools
from tunery.scoring.scorers.texts import normalize
from tunery.store.rows import Row, shards, to_str_list
from tunery.store.score_cache import ids_to_uint64

UInt64s = npt.NDArray[np.uint64]


class Heldout:
    def __init__(self, artifacts: Iterable[Path]) -> None:
        ids, groups = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for artifact in artifacts:
            for shard in shards(artifact):
                table = pq.read_table(shard, columns=["id", "group"])
                ids.append(ids_to_uint64(to_str_list(table["id"])))
                groups.append(group_hashes(table["group"].to_pylist()))
        self._ids, self._groups = np.unique(np.concatenate(ids)), np.unique(np.concatenate(groups))

    def __len__(self) -> int:
        """Number of distinct rows."""
        return len(self._ids)

    def mask(self, ids: Sequence[str], groups: Sequence[str | None]) -> Bools:
        """Return which of the rows are held out."""
        has_group = np.array([group is not None for group in groups], dtype=np.bool_)
        group_heldout = has_group & _is_in(group_hashes(groups), self._groups)
        is_heldout: Bools = _is_in(ids_to_uint64(ids), self._ids) | group_heldout
        return is_heldout


def flag_heldout(artifact: Path, heldout: Heldout, columns: list[str] | None = None) -> Iterator[tuple[Row, bool]]:
    """Yield each row of an artifact and whether it is held out, with 1,024 rows in memory at a time."""
    for shard in shards(artifact):
        for batch in pq.ParquetFile(shard).iter_batches(1024, columns=columns):
            rows: list[Row] = batch.to_pylist()
            is_heldout = heldout.mask([row["id"] for row in rows], [row["group"] for row in rows])
            yield from zip(rows, is_heldout.tolist(), strict=True)


def group_hashes(groups: Iterable[str | None]) -> UInt64s:
    """Return a hash of each group; 0 for no group."""
    return np.array([group_hash(group) for group in groups], dtype=np.uint64)


def group_hash(group: str | None) -> int:
    if group is None:
        return 0
    digest = hashlib.blake2b(normalize(group).encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") | 1  # never 0, which means no group


def _is_in(values: UInt64s, sorted_values: UInt64s) -> Bools:
    if not len(sorted_values):
        return np.zeros(len(values), dtype=np.bool_)
    positions = np.minimum(np.searchsorted(sorted_values, values), len(sorted_values) - 1)
    is_in: Bools = sorted_values[positions] == values
    return is_in
