"""Formats: from a file to records, one reader a family. READERS says which reader, ENDINGS which ending means which."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tunery.data.filesystem import File
from tunery.data.formats.arrow import arrow_rows, parquet_rows
from tunery.data.formats.excel import workbook
from tunery.data.formats.json_values import json_records
from tunery.data.formats.lines import json_lines
from tunery.data.formats.record import Record
from tunery.data.formats.tables import comma_separated, tab_separated
from tunery.data.formats.text import plain_text
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
