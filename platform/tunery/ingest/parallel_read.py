"""Parallel reading: files, and byte ranges of large files, are read by Ray actors.

A task is a file, or RANGE_BYTES bytes of an uncompressed file with one row per line (jsonl, text by line). A worker
writes its result to the work directory of the stage: rows as an Arrow file, their ids and sizes, quarantined lines, and
counts. Ray actors then write the shards of the dataset from these files (parallel_write.py), so the dataset is
identical to the byte to one read by a single process. An interrupted stage resumes with the missing tasks.

Estimate for 100 M rows of 1 kB: 3,000 tasks, and 100 GB of intermediate files besides the 100 GB of the dataset. A row
takes 50 us in a worker; the driver reads 16 bytes per row.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from tunery.ingest.duplicate_count import DuplicateCount
from tunery.ingest.filesystem import ByteRange, File, UnavailableFile
from tunery.ingest.formats import format_of
from tunery.ingest.formats.hub import HubDataset
from tunery.ingest.parallel_write import RowFile, is_worth_parallel, write_files
from tunery.ingest.read import Quarantine, Quarantined, ReadCounts, as_tables, read_part
from tunery.ingest.sources import Builtin, SourcePart, resolve_sources
from tunery.spec import Dataset
from tunery.store import StageContext
from tunery.store.atomic_write import publish_folder, read_json, temporary_name, write_text
from tunery.store.rows import SCHEMA, content_bytes, to_str_list
from tunery.store.score_cache import ids_to_uint64

RANGE_BYTES = 32 << 20
ReadTask = File | HubDataset


def read_tasks(parts: Sequence[SourcePart], stage: Dataset) -> list[ReadTask]:
    """Return the parts in order, with uncompressed files of one row per line split into byte ranges."""
    tasks: list[ReadTask] = []
    for part in parts:
        assert not isinstance(part, Builtin), "worth_reading_in_parallel accepts only files"
        if isinstance(part, File) and _is_splittable(part, stage):
            tasks += [
                dataclasses.replace(part, span=ByteRange(start, min(start + RANGE_BYTES, part.size)))
                for start in range(0, max(1, part.size), RANGE_BYTES)
            ]
        else:
            tasks.append(part)
    return tasks


def _is_splittable(file: File, stage: Dataset) -> bool:
    format_ = format_of(file, stage)
    by_line = format_ == "jsonl" or (format_ == "text" and (stage.sample_by or "line") == "line")
    return by_line and not file.endings[1]


def worth_reading_in_parallel(context: StageContext, stage: Dataset) -> bool:
    """Return whether Ray is running and the source is large. A stage that needs all rows at once (`corrupt_fraction`)
    or stops early (`limit`) is read by one process."""
    if not context.launcher.is_parallel or stage.corrupt_fraction or stage.limit is not None:
        return False
    parts = resolve_sources(stage, context.folder)
    files = [part for part in parts if isinstance(part, File)]
    return (
        len(files) == len(parts)
        and is_worth_parallel(context.launcher, sum(file.size for file in files))
        and len(read_tasks(files, stage)) > 1
    )


def read_in_parallel(
    context: StageContext, stage: Dataset, quarantine: Quarantine, counts: ReadCounts, duplicates: DuplicateCount
) -> int:
    """Write the rows in source order to the folder `context.out`, and return their number. Raises UnavailableFile if a
    file or the network fails while reading."""
    tasks = read_tasks(resolve_sources(stage, context.folder), stage)
    # The name depends on the split into tasks, so that results of another split are not reused.
    folder = context.staging_dir / f"read-{len(tasks)}-{RANGE_BYTES}"
    folder.mkdir(parents=True, exist_ok=True)
    results = [folder / f"{number:06d}" for number in range(len(tasks))]
    pending = [
        {"task": pickle.dumps(task), "out": str(out)}
        for task, out in zip(tasks, results, strict=True)
        if not _is_complete(out)
    ]
    rows = sum(_read_counts(out)["rows"] for out in results if out.is_dir())
    context.emit("progress", done=rows, total=None, unit="rows", detail="starting actors")
    if pending:
        for result in context.launcher.map_tasks(SourceReader, (stage,), pending, on_cpu=True):
            if result["failed"]:
                raise UnavailableFile(result["failed"])
            rows += int(result["rows"])
            context.emit("progress", done=rows, total=None, unit="rows")
    files = []
    line_offset, name = 0, ""
    for task, out in zip(tasks, results, strict=True):
        line_offset, name = line_offset if task.name == name else 0, task.name
        task_counts = _read_counts(out)
        fields: dict[str, Any] = task_counts["counts"]
        counters = {field: Counter(count) for field, count in fields.items() if isinstance(count, dict)}
        counts.add(ReadCounts(**{**fields, **counters}))
        duplicates.add(np.load(out / "ids.npy"))
        _quarantine_lines(out, line_offset, quarantine)
        files.append(RowFile(out / "rows.arrow", out / "sizes.npy", line_offset=line_offset))
        line_offset += task_counts["lines"]
    written = write_files(
        context.launcher,
        True,
        files,
        context.out,
        lambda done: context.emit("progress", done=done, total=rows, unit="rows", detail="writing"),
    )
    shutil.rmtree(folder)
    return written


class SourceReader:
    def __init__(self, stage: Dataset) -> None:
        self._stage = stage

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"task": [pickled task], "out": [folder]} -> {"rows": [count], "failed": [reason]}, one entry per task."""
        results = []
        for pickled, out in zip(batch["task"], batch["out"], strict=True):
            try:
                results.append((run_read_task(pickle.loads(pickled), self._stage, Path(out)), ""))
            except UnavailableFile as error:
                results.append((0, str(error)))
        return {"rows": [rows for rows, _ in results], "failed": [failed for _, failed in results]}


def run_read_task(task: ReadTask, stage: Dataset, out: Path) -> int:
    """Write the folder `out` with rows.arrow, ids.npy, sizes.npy (bytes of content), quarantine.jsonl and counts.json;
    return the number of rows."""
    temporary = temporary_name(out)
    temporary.mkdir(parents=True)
    counts, quarantined = ReadCounts(), 0
    ids, sizes = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    with (
        (temporary / "quarantine.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as quarantine_file,
        pa.ipc.new_file(str(temporary / "rows.arrow"), SCHEMA) as writer,
    ):

        def quarantine(line: Quarantined) -> None:
            nonlocal quarantined
            quarantined += 1
            quarantine_file.write(json.dumps(dataclasses.asdict(line)) + "\n")

        for table in as_tables(read_part(task, stage, quarantine, counts), counts):
            writer.write_table(table)
            ids.append(ids_to_uint64(to_str_list(table["id"])))
            sizes.append(content_bytes(table))
    np.save(temporary / "ids.npy", np.concatenate(ids))
    np.save(temporary / "sizes.npy", np.concatenate(sizes))
    rows = sum(map(len, ids))
    span = task.span if isinstance(task, File) else None
    task_counts = {
        "rows": rows,
        "quarantined": quarantined,
        "lines": span.lines if span else 0,
        "counts": vars(counts),
    }
    write_text(temporary / "counts.json", json.dumps(task_counts))
    if out.exists():  # incomplete, see _is_complete
        shutil.rmtree(out)
    publish_folder(temporary, out)
    return rows


def _is_complete(out: Path) -> bool:
    """Whether a task has a result whose files have all rows and quarantined lines. A result with truncated files is
    removed, and its task repeated."""
    if not out.is_dir():
        return False
    counts = read_json(out / "counts.json") or {}
    lengths: set[int] = set()
    quarantined = -1
    try:
        with pa.memory_map(str(out / "rows.arrow")) as source, pa.ipc.open_file(source) as reader:
            lengths.add(sum(reader.get_batch(number).num_rows for number in range(reader.num_record_batches)))
        lengths |= {len(np.load(out / name)) for name in ("ids.npy", "sizes.npy")}
        quarantined = (out / "quarantine.jsonl").read_bytes().count(b"\n")
    except (OSError, ValueError, EOFError):  # absent, empty or truncated; pa.ArrowInvalid is a ValueError
        lengths.clear()
    if lengths == {counts.get("rows")} and quarantined == counts.get("quarantined"):
        return True
    shutil.rmtree(out)
    return False


def _read_counts(out: Path) -> dict[str, Any]:
    counts: dict[str, Any] = json.loads((out / "counts.json").read_text())
    return counts


def _quarantine_lines(out: Path, line_offset: int, quarantine: Quarantine) -> None:
    """Quarantine the invalid lines of a task. `line_offset` is added to their numbers, which then count from the start
    of the file."""
    with (out / "quarantine.jsonl").open(encoding="utf-8") as file:
        for line in file:
            entry = json.loads(line)
            quarantine(Quarantined(**{**entry, "line": entry["line"] + line_offset}))
