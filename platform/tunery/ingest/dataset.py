"""The `dataset` stage: reads rows from a source into one schema; invalid records go to quarantine.jsonl."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator

import pyarrow as pa

from tunery.errors import RowCountError, StageError
from tunery.ingest.corruption import corrupt
from tunery.ingest.duplicate_count import DuplicateCount
from tunery.ingest.filesystem import UnavailableFile
from tunery.ingest.parallel_read import read_in_parallel, worth_reading_in_parallel
from tunery.ingest.read import Quarantined, ReadCounts, as_tables, read_source, source_label
from tunery.ingest.row_samples import quarantine_facts
from tunery.spec import Dataset
from tunery.store import StageContext, StageResult
from tunery.store.rows import Row, to_str_list, write_tables
from tunery.store.score_cache import ids_to_uint64


def run_dataset(context: StageContext) -> StageResult:
    """Write the rows of the source.

    Facts: records, split into rows, quarantined (counts by reason and the first ones in `quarantine`) and other_splits;
    duplicates (rows with the id of an earlier row), row_format (the most frequent one), source, split,
    injected_corruption (rows by kind of corruption), ignored_columns (columns and message keys that are not part of a
    row, with the number of rows in which they have a value).

    Rows are streamed, except with `corrupt_fraction`, which holds all of them in memory.
    """
    stage = context.spec
    assert isinstance(stage, Dataset)
    counts = ReadCounts()
    shutil.rmtree(context.staging_dir / "ids", ignore_errors=True)  # of an interrupted run
    duplicates = DuplicateCount(context.staging_dir / "ids")

    # Lone surrogates can't be encoded in UTF-8, so they are written as the JSON escapes they were read from.
    with (context.out / "quarantine.jsonl").open("w", encoding="utf-8", errors="backslashreplace") as file:

        def quarantine(line: Quarantined) -> None:
            file.write(json.dumps(dataclasses.asdict(line), ensure_ascii=False) + "\n")

        def read_tables() -> Iterator[pa.Table]:
            count = 0
            source_rows: Iterator[Row] = read_source(stage, context.folder, quarantine, counts)
            if stage.corrupt_fraction:
                source_rows = iter(corrupt(list(source_rows), stage.corrupt_fraction, context.seed))
            for table in as_tables(source_rows, counts):
                duplicates.add(ids_to_uint64(to_str_list(table["id"])))
                count += table.num_rows
                context.emit("progress", done=count, total=None, unit="rows")
                yield table

        try:
            if worth_reading_in_parallel(context, stage):
                rows = read_in_parallel(context, stage, quarantine, counts, duplicates)
            else:
                rows = write_tables(read_tables(), context.out)
        except UnavailableFile as error:
            raise StageError(
                context.name,
                f"{error}",
                cause=f"the file or the network failed after {counts.records:,} records",
                remedy="run the same command again when the file is available",
            ) from error

    if counts.records != rows + counts.quarantined + counts.other_splits:
        raise RowCountError(
            context.name,
            f"{counts.records} records were read, but there are {rows} rows, {counts.quarantined} quarantined "
            f"records and {counts.other_splits} records of other splits",
        )
    if rows == 0:
        with (context.out / "quarantine.jsonl").open(encoding="utf-8") as file:
            first = [line.rstrip("\n") for line in itertools.islice(file, 3)]
        raise StageError(
            context.name,
            f"`{source_label(stage)}` has no valid row",
            cause=f"{counts.quarantined} records are invalid, and the split is `{stage.split}`",
            remedy="see the first reasons below, or select another split" + "".join(f"\n  {line}" for line in first),
        )
    return StageResult(
        {
            "rows": rows,
            "records": counts.records,
            "quarantined": counts.quarantined,
            "quarantine": quarantine_facts(context.out / "quarantine.jsonl"),
            "other_splits": counts.other_splits,
            "duplicates": duplicates.total(),
            "row_format": counts.row_formats.most_common(1)[0][0],
            "source": source_label(stage),
            "split": stage.split,
            "injected_corruption": dict(sorted(counts.corruption_kinds.items())),
            "ignored_columns": dict(sorted(counts.ignored.items())),
        }
    )
