"""Cache of scores by row id, across runs and datasets: a scorer scores a row once.

    <store>/scores/<scorer's fingerprint>/<run>/b<bits>-<prefix>.arrow

A run has the rows that one score stage added, partitioned by the first `bits` bits of their ids to limit the size of a
file, and sorted by id within a file. Files are memory-mapped and searched by bisection, so the actors of a machine
share one copy in the page cache. Runs are immutable and renamed into place. The rows of a truncated file (after a power
failure) count as not cached: they are scored again, and the run of the stage that scored them is replaced.

Estimated sizes: 8 bytes per row for the id and 8 per column, so 100 M rows with 3 columns are 3.2 GB in 512 files. A
look-up of 16,384 ids takes milliseconds if the pages are cached. Vectors take 2 bytes per dimension: 200 GB for 1,024
dimensions. Each score stage with new rows adds a run, and a look-up searches every run, so at MAX_RUNS runs the smaller
half is merged. Readers keep the merged files mapped, or retry.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import shutil
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tunery.store.atomic_write import publish_folder, temporary_name
from tunery.store.vectors import row_bytes

Ids = NDArray[np.uint64]
PARTITION_ROWS = 1 << 18
"""Approximate maximum number of rows per file, which is sorted in memory."""
PARTITION_BYTES = 1 << 28
"""Approximate maximum bytes of vectors per file."""
MAX_VECTOR_BITS = 9
"""Maximum prefix length because of PARTITION_BYTES: all files are open at once while they are written."""
MAX_RUNS = 32


def ids_to_uint64(ids: Iterable[str]) -> Ids:
    """Convert row ids (16 hex digits) to 64-bit integers."""
    return np.frombuffer(bytes.fromhex("".join(ids)), dtype=">u8").astype(np.uint64)


class ScoreCache:
    """The scores of one scorer."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, ids: Ids) -> tuple[NDArray[np.bool_], pa.Table | None]:
        """Return which of `ids` are cached, and the columns of those in the order of `ids` (None if there are none)."""
        while True:
            try:
                return self._find(ids)
            except FileNotFoundError:  # merged in the meantime into another run
                _forget()

    def _find(self, ids: Ids) -> tuple[NDArray[np.bool_], pa.Table | None]:
        known = np.zeros(len(ids), dtype=bool)
        indices: list[NDArray[np.int64]] = []
        tables: list[pa.Table] = []
        for run in self._runs():
            for run_indices, table in _find_in(run, ids, np.flatnonzero(~known)):
                known[run_indices] = True
                indices.append(run_indices)
                tables.append(table)
        if not tables:
            return known, None
        order = np.argsort(np.concatenate(indices), kind="stable")
        return known, pa.concat_tables(tables).take(order)

    def add(self, run: str, tables: Iterable[pa.Table], rows: int) -> None:
        """Keep `tables` (a column `id` of uint64, and the scorer's) as `run`; `rows` is about how many there will be.

        Streams: a partition in memory at a time. A complete run that is there already is left as it is.
        """
        if self._remove_truncated(self.folder / run):
            self._write(run, tables, rows)
            self._merge()

    def _remove_truncated(self, run: Path) -> bool:
        """Remove a run that has a truncated file; return whether there is no such run (any more)."""
        try:
            if all(_mapped(path) is not None for path in _files(run)):
                return False
        except FileNotFoundError:
            return True
        shutil.rmtree(run)
        _forget()
        return True

    def _merge(self) -> None:
        """Merge the smaller half of the runs if there are many, unless another process is merging."""
        if len(self._runs()) < MAX_RUNS:
            return
        with (self.folder / ".merging").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            runs = [run for run in self._runs() if not self._remove_truncated(run)]
            sizes = {run: sum(table.num_rows for table in _tables(run)) for run in runs}
            small = sorted(sizes, key=lambda run: (sizes[run], run.name))[: MAX_RUNS // 2]
            name = "merged-" + hashlib.sha256("".join(run.name for run in small).encode()).hexdigest()[:16]
            self._write(name, (table for run in small for table in _tables(run)), sum(sizes[run] for run in small))
            for run in small:
                shutil.rmtree(run)

    def _write(self, run: str, tables: Iterable[pa.Table], rows: int) -> None:
        final = self.folder / run
        temporary = temporary_name(final)
        temporary.mkdir(parents=True)
        try:
            _write_files(temporary, tables, rows)
            publish_folder(temporary, final)
        except OSError:
            if not final.is_dir():  # otherwise another process has committed the same scores
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        _forget()

    def _runs(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if not path.name.startswith("."))


def _prefix_bits(rows: int, vector_bytes: int) -> int:
    """Return the prefix length in bits for `rows` rows with `vector_bytes` bytes of vectors each."""
    by_rows = int(np.ceil(np.log2(max(rows, 1) / PARTITION_ROWS)))
    by_bytes = int(np.ceil(np.log2(max(rows * vector_bytes, 1) / PARTITION_BYTES)))
    return max(0, by_rows, min(by_bytes, MAX_VECTOR_BITS))


def _prefix(ids: Ids, bits: int) -> NDArray[np.uint64]:
    return np.zeros(len(ids), np.uint64) if bits == 0 else ids >> np.uint64(64 - bits)


def _write_files(folder: Path, tables: Iterable[pa.Table], rows: int) -> None:
    """Write the files of a run."""
    stream = iter(tables)
    first = next(stream, None)
    bits = 0 if first is None else _prefix_bits(rows, row_bytes(first.schema))
    _spill(stream if first is None else itertools.chain([first], stream), folder, bits)
    for spilled in sorted(folder.glob("*.spill")):
        with pa.OSFile(str(spilled), "rb") as file, pa.ipc.open_stream(file) as reader:
            table = reader.read_all()
        _, first_indices = np.unique(table["id"].to_numpy(), return_index=True)
        _write_one_batch(table.take(first_indices), spilled.with_suffix(".arrow"))
        spilled.unlink()


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
    """Write one record batch, so that a memory-mapped column is one array."""
    with pa.ipc.new_file(str(path), table.schema) as writer:
        for batch in table.combine_chunks().to_batches():
            writer.write_batch(batch)


def _find_in(run: Path, ids: Ids, indices: NDArray[np.int64]) -> Iterator[tuple[NDArray[np.int64], pa.Table]]:
    """Yield (indices into `ids`, their columns) for each file of the run with some of `ids[indices]`."""
    files = _files(run)
    if not files or not len(indices):
        return
    bits = int(files[0].name[1:].split("-")[0])
    prefixes = _prefix(ids[indices], bits)
    for path in files:
        candidates = indices[prefixes == np.uint64(int(path.stem.split("-")[1], 16))]
        if not len(candidates):
            continue
        table = _mapped(path)
        if table is None:
            continue
        stored = table["id"].chunk(0).to_numpy()
        positions = np.minimum(np.searchsorted(stored, ids[candidates]), len(stored) - 1)
        hit = stored[positions] == ids[candidates]
        if hit.any():
            yield candidates[hit], table.drop_columns(["id"]).take(positions[hit])


@cache
def _files(run: Path) -> tuple[Path, ...]:
    files = tuple(sorted(run.glob("b*.arrow")))
    if not files and not run.is_dir():
        raise FileNotFoundError(run)
    return files


def _tables(run: Path) -> Iterator[pa.Table]:
    """Yield the tables of a run without truncated files."""
    for path in _files(run):
        table = _mapped(path)
        assert table is not None, "checked by _remove_truncated"
        yield table


@cache
def _mapped(path: Path) -> pa.Table | None:
    """Return the table in a file; None if it is truncated: the end of an Arrow file describes its content."""
    if path.stat().st_size == 0:  # can't be mapped
        return None
    try:
        with pa.memory_map(str(path)) as source:
            return pa.ipc.open_file(source).read_all()
    except pa.ArrowInvalid:
        return None


def _forget() -> None:
    """Forget which files the runs have: a run was added or removed."""
    _files.cache_clear()
    _mapped.cache_clear()
