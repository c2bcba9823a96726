"""Write CSV and TSV files. A CSV record keeps its line if all sources have the same columns and delimiter."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tunery.filter.originals import Original
from tunery.filter.source_columns import SourceColumns, as_text
from tunery.filter.writers.writer import AddedValues, WriteCounts, Writer, WriterFactory
from tunery.ingest.formats.excel import FORMULA_PREFIXES


def separated(delimiter: str) -> WriterFactory:
    @contextmanager
    def opened(path: Path, columns: SourceColumns, added: AddedValues, counts: WriteCounts) -> Iterator[Writer]:
        tables = [table for table in columns.tables if table.kind == "csv"]
        delimiters = {table.delimiter for table in tables if ".tsv" not in table.name.lower()[-len(".tsv.zst") :]}
        used = delimiters.pop() if delimiter == "," and len(delimiters) == 1 else delimiter
        is_same = columns.only_kind() == "csv" and all(
            (table.header, table.delimiter) == (tables[0].header, used) for table in tables
        )
        # Excel recognizes UTF-8 by the byte order mark. It is omitted if the source is a CSV without one.
        has_bom = tables[0].has_bom if tables else True
        line_end = tables[0].line_end if tables else "\n"
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write("\N{BYTE ORDER MARK}" if has_bom else "")
            cells = _SeparatedCells(file, used, line_end, counts)
            if is_same:
                file.write(tables[0].header_text + cells.format_added(list(added)) + line_end)
                yield _SourceLines(cells, len(tables[0].header), list(added))
            else:
                cells.row([*columns.types, *added])
                yield _ConvertedCells(cells, list(columns.types), list(added))

    return opened


class _SeparatedCells:
    def __init__(self, file: Any, delimiter: str, line_end: str, counts: WriteCounts) -> None:
        self.file, self.delimiter, self.line_end, self.counts = file, delimiter, line_end, counts
        self._csv = csv.writer(file, delimiter=delimiter, lineterminator=line_end)

    def row(self, cells: Sequence[str | None]) -> None:
        self._csv.writerow(cells)

    def format_added(self, cells: Sequence[str | None]) -> str:
        """Format cells to append to a line, each preceded by the delimiter."""
        if not cells:
            return ""
        text = io.StringIO()
        csv.writer(text, delimiter=self.delimiter, lineterminator="").writerow([None, *cells])
        return text.getvalue()

    def escaped(self, value: Any) -> str | None:
        """Format a value, with an apostrophe before text that a spreadsheet would treat as a formula: CSV has no cell
        types."""
        text = as_text(value)
        if isinstance(value, str) and text is not None and text.startswith(FORMULA_PREFIXES):
            self.counts.escaped += 1
            return f"'{text}"
        return text


class _SourceLines:
    """Writes each record's line, followed by the added columns."""

    def __init__(self, cells: _SeparatedCells, width: int, further: Sequence[str]) -> None:
        self._cells, self._width, self._added_names = cells, width, further

    def write(self, record: Original, added: AddedValues) -> None:
        further = [as_text(added.get(name)) for name in self._added_names]
        if not record.is_readable:
            self._cells.row([*[None] * self._width, *further])
            return
        if not further:
            self._cells.file.write(record.text + self._cells.line_end)
            return
        cells = record.csv_cells()
        if len(cells) > self._width:
            self._cells.row([*cells[: self._width], *further])
            return
        missing = self._cells.delimiter * (self._width - len(cells))
        self._cells.file.write(record.text + missing + self._cells.format_added(further) + self._cells.line_end)


class _ConvertedCells:
    """Writes the values in the columns of all sources."""

    def __init__(self, cells: _SeparatedCells, names: Sequence[str], further: Sequence[str]) -> None:
        self._cells, self._names, self._added_names = cells, names, further

    def write(self, record: Original, added: AddedValues) -> None:
        values = record.values()
        # Text from a CSV is not escaped in its source either.
        formatted = as_text if record.table.kind == "csv" else self._cells.escaped
        source_cells = [formatted(values.get(name)) for name in self._names]
        self._cells.row([*source_cells, *(as_text(added.get(name)) for name in self._added_names)])
