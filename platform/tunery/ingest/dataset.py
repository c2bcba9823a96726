"""The `dataset` stage: rows from a source, in one schema; what can't be read goes to quarantine.jsonl."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator

import pyarrow as pa

from tunery.errors import RowsLost, StageError
from tunery.ingest.corruption import corrupt
from tunery.ingest.duplicate_count import DuplicateCount
from tunery.ingest.filesystem import UnavailableFile
from tunery.ingest.parallel_read import read_in_parallel, worth_reading_in_parallel
from tunery.ingest.read import Quarantine, Quarantined, ReadCounts, as_tables, read_source, source_label
from tunery.ingest.row_samples import quarantine_facts
from tunery.spec import Dataset
from tunery.store import StageContext, StageResult
from tunery.store.rows import Row, to_str_list, write_tables
from tunery.store.score_cache import ids_to_uint64


def run_dataset(context: StageContext) -> StageResult:
    """Facts: records, and what became of them: rows, quarantined (by reason, with the
    first ones, in quarantine), other_splits; duplicates (rows whose id was there
    before), shape (the most frequent one), source, split, planted by kind, ignored_columns
    (columns and keys of turns that no row keeps: the number of rows in which they hold something).

    Streams; but where rows are to be damaged (`corrupt_fraction`) all of them are in memory.
    """
    stage = context.spec
    assert isinstance(stage, Dataset)
    tally = ReadCounts()
    shutil.rmtree(context.work / "ids", ignore_errors=True)  # of a run that was cut off
    duplicates = DuplicateCount(context.work / "ids")

    # What UTF-8 has no bytes for (half of a surrogate pair) is written as the JSON escape that it was read from.
    with (context.out / "quarantine.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:

        def quarantine(line: Quarantined) -> None:
            file.write(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n")

        def counted() -> Iterator[pa.Table]:
            count = 0
            for table in _tables(context, stage, quarantine, tally):
                duplicates.add(ids_to_uint64(to_str_list(table["id"])))
                count += table.num_rows
                context.emit("progress", done=count, total=None, unit="rows")
                yield table

        try:
            rows = write_tables(counted(), context.out)
        except UnavailableFile as error:
            raise StageError(
                context.name,
                f"{error}",
                cause=f"the file or the network failed after {tally.records:,} records",
                remedy="give the same command again once it can be read",
            ) from error

    if tally.records != rows + tally.quarantined + tally.other_splits:
        raise RowsLost(
            context.name,
            f"{tally.records} records were read, and {rows} rows, {tally.quarantined} quarantined and "
            f"{tally.other_splits} of other splits came of them",
        )
    if rows == 0:
        with (context.out / "quarantine.jsonl").open(encoding="utf-8") as file:
            first = [line.rstrip("\n") for line in itertools.islice(file, 3)]
        raise StageError(
            context.name,
            f"`{source_label(stage)}` gave no row",
            cause=f"{tally.quarantined} lines could not be read, and the split is `{stage.split}`",
            remedy="see the first reasons below, or choose another split" + "".join(f"\n  {line}" for line in first),
        )
    return StageResult(
        {
            "rows": rows,
            "records": tally.records,
            "quarantined": tally.quarantined,
            "quarantine": quarantine_facts(context.out / "quarantine.jsonl"),
            "other_splits": tally.other_splits,
            "duplicates": duplicates.total(),
            "shape": tally.shapes.most_common(1)[0][0],
            "source": source_label(stage),
            "split": stage.split,
            "planted": dict(sorted(tally.planted.items())),
            "ignored_columns": dict(sorted(tally.ignored.items())),
        }
    )


def _tables(context: StageContext, stage: Dataset, quarantine: Quarantine, tally: ReadCounts) -> Iterator[pa.Table]:
    if worth_reading_in_parallel(context, stage):
        return read_in_parallel(context, stage, quarantine, tally)
    rows: Iterator[Row] = read_source(stage, context.folder, quarantine, tally)
    if stage.corrupt_fraction:
        rows = iter(corrupt(list(rows), stage.corrupt_fraction, context.seed))
    return as_tables(rows, tally)
