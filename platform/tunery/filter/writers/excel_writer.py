"""Write Excel workbooks. A row from a workbook keeps its sheet and the types and number formats of its cells."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from tunery.errors import RequestError
from tunery.filter.originals import Original, OriginalCell
from tunery.filter.source_columns import SourceColumns, as_text
from tunery.filter.writers.writer import AddedValues, WriteCounts, Writer
from tunery.ingest.formats.excel import FORMULA_PREFIXES

MAX_SHEET_ROWS = 1_048_575
"""Maximum rows of an Excel sheet (1,048,576), without the header."""
MAX_CELL_CHARS = 32_767
"""Maximum characters of an Excel cell."""
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""Characters that XML 1.0 can't represent."""
MAX_EXACT_INT = 2**53
"""Largest integer that a spreadsheet represents exactly: its numbers are float64."""


@contextmanager
def workbook(path: Path, columns: SourceColumns, added: AddedValues, counts: WriteCounts) -> Iterator[Writer]:
    from openpyxl import Workbook

    book = Workbook(write_only=True)
    cells = _SheetCells(path, book, counts)
    workbooks = {table.name.removesuffix(f"#{table.sheet}") for table in columns.tables}
    try:
        if columns.only_kind() == "xlsx" and len(workbooks) == 1:
            yield _SourceSheets(cells, columns, list(added))
        else:
            yield _SingleSheet(cells, list(columns.types), list(added))
    except BaseException:
        # openpyxl 3.1 prints a traceback if open sheets are garbage-collected.
        for sheet in book.worksheets:
            sheet.close()
        raise
    book.save(path)


class _SheetCells:
    def __init__(self, path: Path, book: Any, counts: WriteCounts) -> None:
        self._path, self.book, self._done = path, book, counts
        self._rows: dict[str, int] = {}

    def new_sheet(self, title: str, header: Sequence[Any]) -> Any:
        from openpyxl.styles import Font

        sheet = self.book.create_sheet(title)
        sheet.freeze_panes = "A2"
        header_cells = [self.cell(sheet, name) for name in header]
        for cell in header_cells:
            if cell is not None:
                cell.font = Font(bold=True)
        sheet.append(header_cells)
        return sheet

    def append(self, sheet: Any, cells: Sequence[Any]) -> None:
        count = self._rows[sheet.title] = self._rows.get(sheet.title, 0) + 1
        if count > MAX_SHEET_ROWS:
            raise RequestError(
                f"the rows don't fit into {self._path}",
                cause=f"an Excel sheet has {MAX_SHEET_ROWS:,} rows below its header",
                remedy=f"use another format, for example {self._path.stem}.parquet (scores are cached), or keep fewer",
            )
        sheet.append([self.cell(sheet, cell) for cell in cells])

    def cell(self, sheet: Any, value: Any) -> Any:
        """Convert a value, or an OriginalCell of a source's workbook, for openpyxl; None for an empty cell."""
        from openpyxl.cell import WriteOnlyCell

        original = value if isinstance(value, OriginalCell) else None
        plain = _sheet_value(value if original is None else original.value)
        if plain is None:
            return None
        if not isinstance(plain, str):
            cell = WriteOnlyCell(sheet, plain)
            if original is not None:
                cell.number_format = original.number_format
            return cell
        text = UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", plain)
        if len(text) > MAX_CELL_CHARS:
            raise RequestError(
                f"a text of {len(text):,} characters doesn't fit into {self._path}",
                cause=f"the maximum of an Excel cell is {MAX_CELL_CHARS:,}, and texts are not truncated",
                remedy="use another format, for example .parquet (scores are cached), or a rule on `length`",
            )
        self._done.replaced += text != plain
        cell = WriteOnlyCell(sheet, text)
        # openpyxl treats text that begins with "=" as a formula, and spreadsheets treat digits as a number.
        cell.data_type = "e" if original is not None and original.data_type == "e" else "s"
        cell.number_format = original.number_format if original is not None else "@"
        cell.quotePrefix = text.startswith(FORMULA_PREFIXES)  # so that it remains text when a user edits the cell
        return cell


def _sheet_value(value: Any) -> Any:
    """Convert to a number, boolean, date, time or text; None for an empty cell."""
    if isinstance(value, bool | timedelta) or (isinstance(value, datetime | time) and value.tzinfo is None):
        return value
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    if isinstance(value, int):
        return value if abs(value) <= MAX_EXACT_INT else str(value)
    if isinstance(value, float | Decimal):
        return value if value == value and abs(value) != float("inf") else None
    return as_text(value)


class _SourceSheets:
    """Writes the sheets of a single source workbook, each with its own header."""

    def __init__(self, cells: _SheetCells, columns: SourceColumns, added: Sequence[str]) -> None:
        self._cells = cells
        self._tables = {table.name: table for table in columns.tables}
        self._sheets: dict[str, Any] = {}
        for table in columns.tables:
            if table.sheet:
                header = [*table.header_cells, *[None] * (table.width - len(table.header_cells)), *added]
                self._sheets[table.name] = cells.new_sheet(table.sheet, header)
        self._added_names = added

    def write(self, record: Original, added: AddedValues) -> None:
        name = record.table.name
        if name not in self._sheets:  # the record is from a workbook that can't be read completely
            title = "unreadable" if "unreadable" not in self._cells.book.sheetnames else "unreadable records"
            self._sheets[name] = self._cells.new_sheet(title, self._added_names)
        width = self._tables[name].width if self._tables[name].sheet else 0
        padding = [None] * (width - len(record.cells))
        self._cells.append(self._sheets[name], [*record.cells, *padding, *map(added.get, self._added_names)])


class _SingleSheet:
    """Writes all records to one sheet, with the columns of all sources."""

    def __init__(self, cells: _SheetCells, names: Sequence[str], added: Sequence[str]) -> None:
        self._cells, self._names, self._added_names = cells, names, added
        self._sheet = cells.new_sheet("rows", [*names, *added])

    def write(self, record: Original, added: AddedValues) -> None:
        values: dict[str, Any] = record.values()
        if record.table.kind == "xlsx":
            formats = zip(record.table.names, record.cells, strict=False)
            values |= {name: cell for name, cell in formats if name in values}
        self._cells.append(self._sheet, [*map(values.get, self._names), *map(added.get, self._added_names)])
