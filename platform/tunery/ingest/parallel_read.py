"""Reading on every CPU: files, and spans of long ones, are read side by side on Ray Data and put together in order.

A unit is a file, or SPAN bytes of a plain one whose lines are its rows (jsonl, text by line). What a worker makes of it
waits in the stage's work folder: rows as an Arrow stream, what could not be read, and the counts. The driver joins them
in the order of the source, as tables, without looking into rows; so the dataset is the same to the byte as one that a
single process has read, and a job that was killed goes on with the units that are missing.

On paper, 100 M rows of 1 kB: 3,000 units, 100 GB of waiting files beside the 100 GB that are written. A row takes a
worker 50 us, the driver 3 us.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from tunery.ingest.filesystem import ByteRange, File, UnavailableFile
from tunery.ingest.formats import format_of
from tunery.ingest.formats.hub import HubDataset
from tunery.ingest.read import Quarantine, Quarantined, ReadCounts, as_tables, read_part
from tunery.ingest.sources import Builtin, Part, find_parts
from tunery.models.actor_pool import map_tasks
from tunery.spec import Dataset
from tunery.store import StageContext
from tunery.store.rows import SCHEMA

SPAN = 32 << 20
WORTH_IT = 256 << 20
"""Bytes of files from which on it pays: actors take some seconds to start, in which one process reads 100 MB."""
ReadTask = File | HubDataset


def read_tasks(parts: Sequence[Part], stage: Dataset) -> list[ReadTask]:
    """The parts in their order, long plain files of lines in spans."""
    units: list[ReadTask] = []
    for part in parts:
        assert not isinstance(part, Builtin), "worth_reading_in_parallel saw to it"
        if isinstance(part, File) and _in_lines(part, stage):
            begins = range(0, max(1, part.size), SPAN)
            units += [
                dataclasses.replace(part, span=ByteRange(begin, min(begin + SPAN, part.size))) for begin in begins
            ]
        else:
            units.append(part)
    return units


def _in_lines(file: File, stage: Dataset) -> bool:
    format_ = format_of(file, stage)
    by_line = format_ == "jsonl" or (format_ == "text" and (stage.sample_by or "line") == "line")
    return by_line and not file.endings[1]


def worth_reading_in_parallel(context: StageContext, stage: Dataset) -> bool:
    """Where Ray is there and the source is long. What looks at all rows (`corrupt_fraction`) or stops early (`limit`)
    is read by one process."""
    if context.in_process or stage.corrupt_fraction or stage.limit is not None or "ray" not in sys.modules:
        return False
    import ray

    if not ray.is_initialized():
        return False
    parts = find_parts(stage, context.folder)
    files = [part for part in parts if isinstance(part, File)]
    return (
        len(files) == len(parts) and sum(file.size for file in files) >= WORTH_IT and len(read_tasks(files, stage)) > 1
    )


def read_in_parallel(
    context: StageContext, stage: Dataset, quarantine: Quarantine, tally: ReadCounts
) -> Iterator[pa.Table]:
    """Tables of rows, in the order of the source. Raises UnavailableFile when a file or the network fails under way."""
    units = read_tasks(find_parts(stage, context.folder), stage)
    # Another version may cut otherwise: what it left is not taken for ours.
    folder = context.work / f"read-{len(units)}-{SPAN}"
    folder.mkdir(parents=True, exist_ok=True)
    made = [folder / f"{number:06d}" for number in range(len(units))]
    todo = [
        {"unit": pickle.dumps(unit), "out": str(out)} for unit, out in zip(units, made, strict=True) if not out.is_dir()
    ]
    rows = sum(_told(out)["rows"] for out in made if out.is_dir())
    context.emit("progress", done=rows, total=None, unit="rows", detail="starting actors")
    for told in map_tasks(ReadActor, (stage,), todo, context.compute, context.in_process, on_cpu=True) if todo else ():
        if told["failed"]:
            raise UnavailableFile(told["failed"])
        rows += int(told["rows"])
        context.emit("progress", done=rows, total=None, unit="rows")
    before, name = 0, ""
    for unit, out in zip(units, made, strict=True):
        before, name = before if unit.name == name else 0, unit.name
        told = _told(out)
        counts: dict[str, Any] = told["tally"]
        counters = {name: Counter(count) for name, count in counts.items() if isinstance(count, dict)}
        tally.add(ReadCounts(**{**counts, **counters}))
        yield from _joined(out, before, quarantine)
        before += told["lines"]
    shutil.rmtree(folder)


class ReadActor:
    def __init__(self, stage: Dataset) -> None:
        self._stage = stage

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """{"unit": [pickled], "out": [folder]} -> {"rows": [count], "failed": [reason]}, a unit each."""
        told = []
        for pickled, out in zip(batch["unit"], batch["out"], strict=True):
            try:
                told.append((run_read_task(pickle.loads(pickled), self._stage, Path(out)), ""))
            except UnavailableFile as error:
                told.append((0, str(error)))
        return {"rows": [rows for rows, _ in told], "failed": [failed for _, failed in told]}


def run_read_task(unit: ReadTask, stage: Dataset, out: Path) -> int:
    """Writes the folder `out`: rows.arrow, quarantine.jsonl and tally.json. Returns the number of rows."""
    temporary = out.with_suffix(".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    tally, rows = ReadCounts(), 0
    with (
        (temporary / "quarantine.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as bad,
        pa.ipc.new_stream(str(temporary / "rows.arrow"), SCHEMA) as writer,
    ):

        def quarantine(line: Quarantined) -> None:
            bad.write(json.dumps(dataclasses.asdict(line)) + "\n")

        for table in as_tables(read_part(unit, stage, quarantine, tally), tally):
            writer.write_table(table)
            rows += table.num_rows
    span = unit.span if isinstance(unit, File) else None
    told = {"rows": rows, "lines": span.lines if span else 0, "tally": vars(tally)}
    (temporary / "tally.json").write_text(json.dumps(told))
    temporary.rename(out)
    return rows


def _told(out: Path) -> dict[str, Any]:
    told: dict[str, Any] = json.loads((out / "tally.json").read_text())
    return told


def _joined(out: Path, before: int, quarantine: Quarantine) -> Iterator[pa.Table]:
    """A unit's rows and bad lines, their lines counted from the file's first on."""
    with (out / "quarantine.jsonl").open(encoding="utf-8") as file:
        for line in file:
            bad = json.loads(line)
            quarantine(Quarantined(**{**bad, "line": bad["line"] + before}))
    at = SCHEMA.get_field_index("line")
    with pa.OSFile(str(out / "rows.arrow"), "rb") as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            table = pa.Table.from_batches([batch])
            yield table.set_column(at, SCHEMA.field(at), pc.add(table["line"], before)) if before else table
