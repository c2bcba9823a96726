"""File formats: readers that yield the records of a file. READERS maps formats to readers, ENDINGS file name endings to
formats."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tunery.ingest.filesystem import File
from tunery.ingest.formats.arrow import arrow_rows, parquet_rows
from tunery.ingest.formats.delimited import comma_separated, tab_separated
from tunery.ingest.formats.excel import workbook
from tunery.ingest.formats.json_values import json_records
from tunery.ingest.formats.lines import json_lines
from tunery.ingest.formats.record import Record
from tunery.ingest.formats.text import plain_text
from tunery.spec import Dataset

Reader = Callable[[File, Dataset], Iterator[Record]]
"""Raises CorruptFile if the file can't be read further, UnavailableFile if the cause is outside the file. All records
before the error are yielded first."""

READERS: dict[str, Reader] = {
    "jsonl": json_lines,
    "json": json_records,
    "csv": comma_separated,
    "tsv": tab_separated,
    "xlsx": workbook,
    "parquet": parquet_rows,
    "arrow": arrow_rows,
    "text": plain_text,
}

ENDINGS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".xlsx": "xlsx",
    ".xlsm": "xlsx",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".txt": "text",
}
"""Each may be followed by .gz or .zst."""


def format_of(file: File, stage: Dataset) -> str | None:
    """Return the format set in the stage, or that of the file name ending; None for an unknown ending."""
    return stage.format or ENDINGS.get(file.endings[0])
