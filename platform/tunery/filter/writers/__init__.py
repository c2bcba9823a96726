"""Writers of records, one for each ending of a file. What a record was in its source it is again:

    .jsonl .ndjson .json    a JSON record: its own text
    .csv .tsv               a record of a CSV: its own line, where all sources have the same columns and delimiter
    .xlsx                   a row of a workbook: values with their types and number formats, sheet by sheet
    .parquet                a row of a Parquet or Arrow file: its Arrow values, with the source's schema

Of another form, its values in all columns of all sources. Further columns (scores, the rule that dropped the row) come
last. A writer streams: at most a batch of rows is in memory.
"""

from __future__ import annotations

from tunery.filter.writers.excel import workbook
from tunery.filter.writers.json_records import json_array, json_lines
from tunery.filter.writers.parquet import parquet
from tunery.filter.writers.separated import separated
from tunery.filter.writers.writer import Open, Writer, Written

__all__ = ["WRITERS", "Open", "Writer", "Written"]

WRITERS: dict[str, Open] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_array,
    ".csv": separated(","),
    ".tsv": separated("\t"),
    ".xlsx": workbook,
    ".parquet": parquet,
}
