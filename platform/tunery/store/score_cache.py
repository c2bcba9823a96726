"""Scores by row id, kept across runs: a row is scored once by a scorer, whatever datasets it stands in.

    <store>/scores/<scorer's fingerprint>/<run>/b<bits>-<prefix>.arrow

A run is what one score stage added: its rows split by the first `bits` bits of their ids, so that no file is larger
than memory likes, and sorted by id within a file. Files are memory-mapped, and a look-up is a binary search, so that
many actors of a machine share one copy in the page cache. Runs are immutable and renamed into place.

Sizes on paper: 8 bytes a row for the id and 8 a column. 100 M rows with 3 columns are 3.2 GB in 512 files; a look-up of
16,384 ids takes milliseconds when pages are warm. Vectors are 2 bytes a dimension: of 1,024 dimensions 200 GB. Each
score stage that finds new rows adds a run, and a look-up asks every run; so when there are MOST_RUNS, the smaller half
becomes one. Whoever read them has them mapped still, or looks again.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunery.store.vectors import row_bytes

Ids = NDArray[np.uint64]
PARTITION_ROWS = 1 << 18
"""At most about so many rows a file: it is sorted in memory."""
PARTITION_BYTES = 1 << 28
"""At most about so many bytes of vectors a file."""
MOST_BITS = 9
"""Of a split for vectors' sake: its files are written side by side, and a process may have so many open."""
MOST_RUNS = 32


def ids_to_uint64(ids: Iterable[str]) -> Ids:
    """Row ids (16 hex digits) as 64-bit numbers."""
    return np.frombuffer(bytes.fromhex("".join(ids)), dtype=">u8").astype(np.uint64)


class ScoreCache:
    """The scores of one scorer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, ids: Ids) -> tuple[NDArray[np.bool_], pa.Table | None]:
        """Which of `ids` are known, and the columns of those, in the order of `ids`; None when none is."""
        while True:
            try:
                return self._find(ids)
            except FileNotFoundError:  # merged meanwhile: it is in another run now
                _files.cache_clear()

    def _find(self, ids: Ids) -> tuple[NDArray[np.bool_], pa.Table | None]:
        known = np.zeros(len(ids), dtype=bool)
        places: list[NDArray[np.int64]] = []
        found: list[pa.Table] = []
        for run in self._runs():
            for place, table in _find_in(run, ids, np.flatnonzero(~known)):
                known[place] = True
                places.append(place)
                found.append(table)
        if not found:
            return known, None
        order = np.argsort(np.concatenate(places), kind="stable")
        return known, pa.concat_tables(found).take(order)

    def add(self, run: str, tables: Iterable[pa.Table], rows: int) -> None:
        """Keep `tables` (a column `id` of uint64, and the scorer's) as `run`; `rows` is about how many there will be.

        Streams: a partition in memory at a time. A run that is there already is left as it is.
        """
        if not (self.folder / run).is_dir():
            self._write(run, tables, rows)
            self._merge()

    def _merge(self) -> None:
        """One run of the smaller half, where there are many; not while somebody else does it."""
        if len(self._runs()) < MOST_RUNS:
            return
        with (self.folder / ".merging").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            sizes = {run: sum(_mapped(path).num_rows for path in _files(run)) for run in self._runs()}
            small = sorted(sizes, key=lambda run: (sizes[run], run.name))[: MOST_RUNS // 2]
            name = "merged-" + hashlib.sha256("".join(run.name for run in small).encode()).hexdigest()[:16]
            self._write(
                name, (_mapped(path) for run in small for path in _files(run)), sum(sizes[run] for run in small)
            )
            for run in small:
                shutil.rmtree(run)

    def _write(self, run: str, tables: Iterable[pa.Table], rows: int) -> None:
        final = self.folder / run
        temporary = self.folder / f".{run}-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        stream = iter(tables)
        first = next(stream, None)
        bits = 0 if first is None else _bits(rows, row_bytes(first.schema))
        _spill(stream if first is None else itertools.chain([first], stream), temporary, bits)
        for spilled in sorted(temporary.glob("*.spill")):
            with pa.OSFile(str(spilled), "rb") as file, pa.ipc.open_stream(file) as reader:
                whole = reader.read_all()
            _, once = np.unique(whole["id"].to_numpy(), return_index=True)
            _write_one_batch(whole.take(once), spilled.with_suffix(".arrow"))
            spilled.unlink()
        try:
            temporary.rename(final)
        except OSError:  # somebody else was faster, with the same scores
            shutil.rmtree(temporary)

    def _runs(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if not path.name.startswith("."))


def _bits(rows: int, vector_bytes: int) -> int:
    """Of the prefix that splits so many rows, each with vectors of so many bytes."""
    by_rows = int(np.ceil(np.log2(max(rows, 1) / PARTITION_ROWS)))
    by_bytes = int(np.ceil(np.log2(max(rows * vector_bytes, 1) / PARTITION_BYTES)))
    return max(0, by_rows, min(by_bytes, MOST_BITS))


def _prefix(ids: Ids, bits: int) -> NDArray[np.uint64]:
    return np.zeros(len(ids), np.uint64) if bits == 0 else ids >> np.uint64(64 - bits)


def _spill(tables: Iterable[pa.Table], folder: Path, bits: int) -> None:
    writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}
    try:
        for table in tables:
            prefixes = _prefix(table["id"].to_numpy(), bits)
            for prefix in np.unique(prefixes).tolist():
                if prefix not in writers:
                    writers[prefix] = pa.ipc.new_stream(str(folder / f"b{bits}-{prefix:06x}.spill"), table.schema)
                writers[prefix].write_table(table.filter(pa.array(prefixes == prefix)))
    finally:
        for writer in writers.values():
            writer.close()


def _write_one_batch(table: pa.Table, path: Path) -> None:
    """One record batch, so that a memory-mapped column is one array."""
    with pa.ipc.new_file(str(path), table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)


def _find_in(run: Path, ids: Ids, wanted: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
    """(places within `ids`, their columns) for each file of the run that knows some of the wanted ones."""
    files = _files(run)
    if not files or not len(wanted):
        return
    bits = int(files[0].name[1:].split("-")[0])
    prefixes = _prefix(ids[wanted], bits)
    for path in files:
        asked = wanted[prefixes == np.uint64(int(path.stem.split("-")[1], 16))]
        if not len(asked):
            continue
        table = _mapped(path)
        stored = table["id"].chunk(0).to_numpy()
        at = np.minimum(np.searchsorted(stored, ids[asked]), len(stored) - 1)
        hit = stored[at] == ids[asked]
        if hit.any():
            yield asked[hit], table.drop_columns(["id"]).take(at[hit])


@cache
def _files(run: Path) -> tuple[Path, ...]:
    files = tuple(sorted(run.glob("b*.arrow")))
    if not files and not run.is_dir():
        raise FileNotFoundError(run)
    return files


@cache
def _mapped(path: Path) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).read_all()
