"""Which rows are held out: by id, and by the group that must not straddle splits.

Groups are compared without regard to case, white space and the composition of characters: the same question in other
writing is the same question. In memory are 16 bytes a held-out row.
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

Numbers = npt.NDArray[np.uint64]


class Heldout:
    def __init__(self, artifacts: Iterable[Path]) -> None:
        ids, groups = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
        for artifact in artifacts:
            for shard in shards(artifact):
                table = pq.read_table(shard, columns=["id", "group"])
                ids.append(ids_to_uint64(to_str_list(table["id"])))
                groups.append(group_numbers(table["group"].to_pylist()))
        self._ids, self._groups = np.unique(np.concatenate(ids)), np.unique(np.concatenate(groups))

    def __len__(self) -> int:
        """Distinct rows."""
        return len(self._ids)

    def among(self, ids: Sequence[str], groups: Sequence[str | None]) -> Bools:
        """Which of the rows are held out."""
        known = np.array([group is not None for group in groups], dtype=np.bool_)
        held: Bools = _in(ids_to_uint64(ids), self._ids) | (known & _in(group_numbers(groups), self._groups))
        return held


def flag_heldout(artifact: Path, heldout: Heldout, columns: list[str] | None = None) -> Iterator[tuple[Row, bool]]:
    """Each row of an artifact, and whether it is held out; 1,024 rows in memory at a time."""
    for shard in shards(artifact):
        for batch in pq.ParquetFile(shard).iter_batches(1024, columns=columns):
            rows: list[Row] = batch.to_pylist()
            held = heldout.among([row["id"] for row in rows], [row["group"] for row in rows])
            yield from zip(rows, held.tolist(), strict=True)


def group_numbers(groups: Iterable[str | None]) -> Numbers:
    """A hash of each group; 0 where there is none."""
    return np.array([group_number(group) for group in groups], dtype=np.uint64)


def group_number(group: str | None) -> int:
    if group is None:
        return 0
    digest = hashlib.blake2b(normalize(group).encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") | 1  # never 0, which is no group


def _in(numbers: Numbers, known: Numbers) -> Bools:
    if not len(known):
        return np.zeros(len(numbers), dtype=np.bool_)
    places = np.minimum(np.searchsorted(known, numbers), len(known) - 1)
    found: Bools = known[places] == numbers
    return found
