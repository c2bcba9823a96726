"""Parallel writing of shards from rows that are in several files, such as the results of read tasks or the shards of
another artifact.

Where a shard ends depends only on the sizes of the rows (store/rows.py), so the driver reads the sizes, 8 bytes per row
and one file at a time, and plans which rows of which files each shard has. Ray actors then read those rows and write
the shards. The files are equal to the byte to those of one process, and no row passes through the driver.
"""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tunery.store import Launcher
from tunery.store.atomic_write import replace_file
from tunery.store.rows import SCHEMA, ShardBoundaries, shard_path, write_shard
from tunery.workers.map_tasks import Task, map_in_process

MIN_PARALLEL_BYTES = 256 << 20
"""Minimum total size of the files for work on Ray actors. They take some seconds to start, in which one process reads
100 MB."""


@dataclass(frozen=True)
class RowFile:
    """A file with rows of the schema, in order: Parquet, or Arrow's IPC file format (.arrow)."""

    path: Path
    sizes: Path
    """File with the content bytes of each row to write (`np.save`, int64)."""
    kept: Path | None = None
    """File with a mask of the rows to write (`np.save`, bool); None: all rows."""
    line_offset: int = 0
    """Added to the column `line`."""

    def read(self, start: int, stop: int) -> pa.Table:
        """Return rows `start` to `stop` of those to write."""
        if self.path.suffix == ".arrow":
            table = _read_arrow(self.path, start, stop)
        else:
            table = pq.read_table(self.path)
            if self.kept is not None:
                table = table.filter(pa.array(np.load(self.kept)))
            table = table.slice(start, stop - start)
        if self.line_offset:
            column = SCHEMA.get_field_index("line")
            table = table.set_column(column, SCHEMA.field(column), pc.add(table["line"], self.line_offset))
        return table


RowSlice = tuple[RowFile, int, int]
"""Rows `start` to `stop` of a file."""


def is_worth_parallel(launcher: Launcher, num_bytes: int) -> bool:
    """Return whether Ray is running and files of `num_bytes` in total are worth the start of actors."""
    if not launcher.is_parallel or num_bytes < MIN_PARALLEL_BYTES or "ray" not in sys.modules:
        return False
    import ray

    return bool(ray.is_initialized())


def map_files(
    launcher: Launcher, parallel: bool, callable_class: type, arguments: tuple[Any, ...], tasks: Sequence[Task]
) -> Iterator[Task]:
    """Run tasks that read and write files: on Ray actors, in order of completion, if `parallel`, else in this process
    in order."""
    if parallel:
        return launcher.map_tasks(callable_class, arguments, list(tasks), on_cpu=True)
    return map_in_process(callable_class, arguments, tasks)


def write_files(
    launcher: Launcher, parallel: bool, files: Iterable[RowFile], folder: Path, progress: Callable[[int], None]
) -> int:
    """Write the rows of `files`, in order, as the shards `folder`/rows, and return their number. `progress` is called
    with the number of rows written so far."""
    target = folder / "rows"
    target.mkdir(parents=True)
    tasks = [{"shard": index, "slices": pickle.dumps(slices)} for index, slices in enumerate(_plan_shards(files))]
    rows = 0
    for result in map_files(launcher, parallel, ShardWriter, (target,), tasks):
        rows += int(result["rows"])
        progress(rows)
    return rows


def _plan_shards(files: Iterable[RowFile]) -> Iterator[list[RowSlice]]:
    """Yield for each shard the rows that it has."""
    boundaries, slices, is_empty = ShardBoundaries(), list[RowSlice](), True
    for file in files:
        for start, stop, ends_shard in boundaries.split(np.load(file.sizes)):
            is_empty = False
            if stop > start:
                slices.append((file, start, stop))
            if ends_shard:
                yield slices
                slices = []
    if slices or is_empty:
        yield slices


class ShardWriter:
    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"shard": [index], "slices": [pickled list of RowSlice]} -> {"rows": [count]}, one entry per shard."""
        counts = []
        for index, pickled in zip(batch["shard"], batch["slices"], strict=True):
            slices: list[RowSlice] = pickle.loads(pickled)
            tables = [file.read(start, stop) for file, start, stop in slices]
            with replace_file(shard_path(self._folder, int(index)), sync=False) as temporary:
                write_shard(tables, temporary)
            counts.append(sum(table.num_rows for table in tables))
        return {"rows": counts}


def _read_arrow(path: Path, start: int, stop: int) -> pa.Table:
    with pa.memory_map(str(path)) as source:
        reader = pa.ipc.open_file(source)
        batches, first = [], 0
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)  # of a memory map, so nothing is read yet
            if first + batch.num_rows > start and first < stop:
                batches.append(
                    batch.slice(max(0, start - first), min(stop, first + batch.num_rows) - max(start, first))
                )
            first += batch.num_rows
        return pa.Table.from_batches(batches, reader.schema)
