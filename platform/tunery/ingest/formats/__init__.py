"""Formats: from a file to records, one reader a family. READERS says which reader, ENDINGS which ending means which."""

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
"""Raises Damaged when the file can't be read further, OutOfReach when that is no fault of the file. Every record that
stands before either has been given."""

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
"""Behind each there may be .gz or .zst."""


def format_of(file: File, stage: Dataset) -> str | None:
    """The format that the stage names or the file's ending means; None for an ending that is not known."""
    return stage.format or ENDINGS.get(file.endings[0])
