"""Grouping through files: what does not fit in memory is parted into files that do.

Rows are numbered over all shards, in their order. A comparison across rows writes records under a key, reads one part
of the keys at a time, and writes what it finds under the block of rows that it belongs to; blocks are then read in
order. Each part of each step is bounded by a number of records, whatever the number of rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Records = NDArray[np.void]

RECORDS = 1_000_000
"""In memory at a time: 16 MB of two numbers each, and some times that while they are sorted."""


class PartitionFiles:
    """Numbered files of records. Appending keeps at most `buffer` records in memory."""

    def __init__(self, folder: Path, fields: dict[str, str], buffer: int = RECORDS) -> None:
        # What a killed try appended must not be appended to.
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self._folder, self._buffer = folder, buffer
        self._type = np.dtype(list(fields.items()))
        self._waiting: list[tuple[Integers, Records]] = []
        self._records = 0

    def append(self, parts: Integers, **columns: NDArray[Any]) -> None:
        """One record for each of `parts`, which say where it goes."""
        records = np.empty(len(parts), dtype=self._type)
        for name, column in columns.items():
            records[name] = column
        self._waiting.append((parts, records))
        self._records += len(parts)
        if self._records >= self._buffer:
            self.flush()

    def flush(self) -> None:
        if not self._records:
            return
        parts = np.concatenate([parts for parts, _ in self._waiting])
        order = np.argsort(parts, kind="stable")
        parts, records = parts[order], np.concatenate([records for _, records in self._waiting])[order]
        starts = np.flatnonzero(np.diff(parts, prepend=-1))
        for start, end in zip(starts, [*starts[1:], len(parts)], strict=True):
            # Opened and closed each time: there may be more parts than files that may be open.
            with self._path(int(parts[start])).open("ab") as file:
                file.write(records[start:end].tobytes())
        self._waiting, self._records = [], 0

    def read(self, part: int) -> Records:
        """All records of a part, in the order in which they came."""
        return next(self.pieces(part, -1), np.empty(0, dtype=self._type))

    def pieces(self, part: int, records: int) -> Iterator[Records]:
        """The same, at most so many at a time."""
        self.flush()
        if not self._path(part).exists():
            return
        with self._path(part).open("rb") as file:
            while len(piece := np.fromfile(file, dtype=self._type, count=records)):
                yield piece

    def drop(self, part: int) -> None:
        self._path(part).unlink(missing_ok=True)

    def _path(self, part: int) -> Path:
        return self._folder / f"{part:06d}.bin"


def part_of(keys: NDArray[np.uint64], parts: int) -> Integers:
    """Which of `parts` (fewer than 2**32) a key belongs to; keys are hashes, so the parts come out even."""
    return ((keys >> np.uint64(32)) * np.uint64(parts) >> np.uint64(32)).astype(np.int64)


def run_starts(keys: NDArray[np.uint64]) -> Integers:
    """Of sorted keys: where the run of equal ones that each is in starts."""
    places = np.arange(len(keys))
    new = np.ones(len(keys), dtype=np.bool_)
    new[1:] = keys[1:] != keys[:-1]
    starts: Integers = np.maximum.accumulate(np.where(new, places, 0))
    return starts


@dataclass(frozen=True)
class RowSignatures:
    """What a scorer keeps of each row to compare it with others: a Parquet file a shard, with the rows' `id`."""

    files: tuple[Path, ...]
    prefix: str = ""
    """Of the columns' names in the files, which may hold other scorers' columns, too."""

    def read(self, path: Path, columns: Sequence[str]) -> dict[str, list[Any]]:
        stored = {name: name if name == "id" else self.prefix + name for name in columns}
        table = pq.read_table(path, columns=list(stored.values()))
        return {name: table[at].to_pylist() for name, at in stored.items()}

    def blocks(self, rows: int) -> list[ShardGroup]:
        """The shards in their order, in blocks of at least so many rows but the last."""
        blocks: list[ShardGroup] = []
        gathered: list[tuple[Path, int]] = []
        first = 0
        for shard in self.files:
            gathered.append((shard, int(pq.read_metadata(shard).num_rows)))
            count = sum(count for _, count in gathered)
            if count >= rows or shard is self.files[-1]:
                blocks.append(ShardGroup(first, count, tuple(gathered)))
                gathered, first = [], first + count
        return blocks

    def by_shard(
        self, blocks: Sequence[ShardGroup], columns: Sequence[str]
    ) -> Iterator[tuple[int, dict[str, list[Any]]]]:
        """Number of the first row, and the columns, of each shard."""
        for block in blocks:
            first = block.first
            for path, count in block.shards:
                yield first, self.read(path, columns)
                first += count


@dataclass(frozen=True)
class ShardGroup:
    """Shards of consecutive rows."""

    first: int
    rows: int
    shards: tuple[tuple[Path, int], ...]
    """Each with its number of rows."""


def block_numbers(blocks: Sequence[ShardGroup], rows: NDArray[np.uint64]) -> Integers:
    firsts = np.array([block.first for block in blocks], dtype=np.uint64)
    return (np.searchsorted(firsts, rows, side="right") - 1).astype(np.int64)
