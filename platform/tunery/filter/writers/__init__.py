"""Writers of records by file extension. A record from a source of the same format is preserved:

    .jsonl .ndjson .json    the text of a JSON record
    .csv .tsv               the line of a CSV record, if all sources have the same columns and delimiter
    .xlsx                   the values of a workbook row with their types and number formats, sheet by sheet
    .parquet                the Arrow values of a row of a Parquet or Arrow file, with the source's schema

For a record of another format, the values in the columns of all sources are written. Added columns (scores, the
rule that dropped the row) come last. Writers stream: no writer keeps all rows in memory.
"""

from __future__ import annotations

from tunery.filter.writers.excel_writer import workbook
from tunery.filter.writers.json_records import json_array, json_lines
from tunery.filter.writers.parquet import parquet
from tunery.filter.writers.separated import separated
from tunery.filter.writers.writer import WriteCounts, Writer, WriterFactory

__all__ = ["WRITERS", "WriterFactory", "Writer", "WriteCounts"]

WRITERS: dict[str, WriterFactory] = {
    ".jsonl": json_lines,
    ".ndjson": json_lines,
    ".json": json_array,
    ".csv": separated(","),
    ".tsv": separated("\t"),
    ".xlsx": workbook,
    ".parquet": parquet,
}
