"""Writers of records, one for each ending of a file. What a record was in its source it is again:

    .jsonl .ndjson .json    a JSON record: its own text
    .csv .tsv               a record of a CSV: its own line, where all sources have the same columns and delimiter
    .xlsx                   a row of a workbook: values with their types and number formats, sheet by sheet
    .parquet                a row of a Parquet or Arrow file: its Arrow values, with the source's schema

Of another form, its values in all columns of all sources. Further columns (scores, the rule that dropped the row) come
last. A writer streams: at most a batch of rows is in memory.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from tunery.errors import RequestError
from tunery.filter.columns import SourceColumns, as_text, json_ready
from tunery.filter.originals import Cell, Original, one_line, unique_names

SHEET_ROWS = 1_048_575
"""Rows of an Excel sheet (1,048,576), less the header."""
CELL = 32_767
"""Characters of an Excel cell."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that a spreadsheet takes for a formula
(https://owasp.org/www-community/attacks/CSV_Injection)."""
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""What XML 1.0 has no way to write."""
EXACT = 2**53
"""Whole numbers up to here are exact in a spreadsheet, which has floating-point numbers alone."""

ROW_GROUP = 16_384
ROW_GROUP_BYTES = 32 << 20

Added = Mapping[str, Any]
"""Further columns: name and pyarrow type, or name and value; a row may have fewer."""


@dataclass
class Written:
    """What became of an export."""

    rows: int = 0
    guarded: int = 0
    """Texts that have an apostrophe in front of them now, so that no spreadsheet takes them for a formula."""
    replaced: int = 0
    """Texts in which characters were replaced that a workbook can't hold."""


class Writer(Protocol):
    def write(self, record: Original, added: Added) -> None: ...


Open = Callable[[Path, SourceColumns, Added, Written], AbstractContextManager[Writer]]
"""The file to write, the sources' columns, the further columns with their types, and the counts to fill."""


@contextmanager
def _jsonl(path: Path, columns: SourceColumns, added: Added, done: Written) -> Iterator[Writer]:
    class Lines:
        def write(self, record: Original, added: Added) -> None:
            file.write(one_line(_json_text(record, added)) + "\n")

    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        yield Lines()


@contextmanager
def _json(path: Path, columns: SourceColumns, added: Added, done: Written) -> Iterator[Writer]:
    class Elements:
        def write(self, record: Original, added: Added) -> None:
            text = _json_text(record, added).strip()
            # A value over several lines is as far to the right as its end.
            last = text.rpartition("\n")[2] if "\n" in text else ""
            indent = last[: len(last) - len(last.lstrip())]
            file.write((",\n" if done.rows else "\n") + indent + text)

    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write("[")
        yield Elements()
        file.write("\n]\n")


def _json_text(record: Original, added: Added) -> str:
    further = {name: json_ready(value) for name, value in added.items()}
    if record.table.kind != "json" or not record.is_readable:
        return json.dumps(json_ready(record.values()) | further, ensure_ascii=False)
    if not further:
        return record.text
    # Into the record's own text: its numbers, escapes and order stay as they are.
    before = record.text.rstrip().removesuffix("}").rstrip()
    return before + ("" if before.endswith("{") else ", ") + json.dumps(further, ensure_ascii=False)[1:]


def _separated(delimiter: str) -> Open:
    @contextmanager
    def opened(path: Path, columns: SourceColumns, added: Added, done: Written) -> Iterator[Writer]:
        tables = [table for table in columns.tables if table.kind == "csv"]
        own = {table.delimiter for table in tables if ".tsv" not in table.name.lower()[-len(".tsv.zst") :]}
        used = own.pop() if delimiter == "," and len(own) == 1 else delimiter
        is_same = columns.only_kind() == "csv" and all(
            (table.header, table.delimiter) == (tables[0].header, used) for table in tables
        )
        # The mark tells Excel that the file is UTF-8; what comes from a CSV without one has none.
        has_bom = tables[0].has_bom if tables else True
        line_end = tables[0].line_end if tables else "\n"
        with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
            file.write("\N{BYTE ORDER MARK}" if has_bom else "")
            cells = _SeparatedCells(file, used, line_end, done)
            if is_same:
                file.write(tables[0].header_text + cells.further(list(added)) + line_end)
                yield _OwnLines(cells, len(tables[0].header), list(added))
            else:
                cells.row([*columns.types, *added])
                yield _Cells(cells, list(columns.types), list(added))

    return opened


class _SeparatedCells:
    def __init__(self, file: Any, delimiter: str, line_end: str, done: Written) -> None:
        self.file, self.delimiter, self.line_end, self.done = file, delimiter, line_end, done
        self._csv = csv.writer(file, delimiter=delimiter, lineterminator=line_end)

    def row(self, cells: Sequence[str | None]) -> None:
        self._csv.writerow(cells)

    def further(self, cells: Sequence[str | None]) -> str:
        """Cells behind a line: each with the delimiter in front."""
        if not cells:
            return ""
        text = io.StringIO()
        csv.writer(text, delimiter=self.delimiter, lineterminator="").writerow([None, *cells])
        return text.getvalue()

    def guarded(self, value: Any) -> str | None:
        """A CSV has no types: what begins like a formula is one, unless something is in front of it."""
        text = as_text(value)
        if isinstance(value, str) and text is not None and text.startswith(FORMULA):
            self.done.guarded += 1
            return f"'{text}"
        return text


class _OwnLines:
    """Each record's own line, and behind it the further columns."""

    def __init__(self, cells: _SeparatedCells, width: int, further: Sequence[str]) -> None:
        self._cells, self._width, self._further = cells, width, further

    def write(self, record: Original, added: Added) -> None:
        further = [as_text(added.get(name)) for name in self._further]
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
        self._cells.file.write(record.text + missing + self._cells.further(further) + self._cells.line_end)


class _Cells:
    """Values in the columns of all sources."""

    def __init__(self, cells: _SeparatedCells, names: Sequence[str], further: Sequence[str]) -> None:
        self._cells, self._names, self._further = cells, names, further

    def write(self, record: Original, added: Added) -> None:
        values = record.values()
        # What is text in a CSV was like that before.
        written = as_text if record.table.kind == "csv" else self._cells.guarded
        own = [written(values.get(name)) for name in self._names]
        self._cells.row([*own, *(as_text(added.get(name)) for name in self._further)])


@contextmanager
def _xlsx(path: Path, columns: SourceColumns, added: Added, done: Written) -> Iterator[Writer]:
    from openpyxl import Workbook

    book = Workbook(write_only=True)
    cells = _SheetCells(path, book, done)
    workbooks = {table.name.removesuffix(f"#{table.sheet}") for table in columns.tables}
    try:
        if columns.only_kind() == "xlsx" and len(workbooks) == 1:
            yield _OwnSheets(cells, columns, list(added))
        else:
            yield _OneSheet(cells, list(columns.types), list(added))
    except BaseException:
        # openpyxl 3.1 prints a traceback where sheets are collected that are still open.
        for sheet in book.worksheets:
            sheet.close()
        raise
    book.save(path)


class _SheetCells:
    def __init__(self, path: Path, book: Any, done: Written) -> None:
        self._path, self.book, self._done = path, book, done
        self._rows: dict[str, int] = {}

    def new_sheet(self, title: str, header: Sequence[Any]) -> Any:
        from openpyxl.styles import Font

        sheet = self.book.create_sheet(title)
        sheet.freeze_panes = "A2"
        written = [self.cell(sheet, name) for name in header]
        for cell in written:
            if cell is not None:
                cell.font = Font(bold=True)
        sheet.append(written)
        return sheet

    def append(self, sheet: Any, cells: Sequence[Any]) -> None:
        count = self._rows[sheet.title] = self._rows.get(sheet.title, 0) + 1
        if count > SHEET_ROWS:
            raise RequestError(
                f"the rows don't fit into {self._path}",
                cause=f"an Excel sheet has {SHEET_ROWS:,} rows below its header",
                remedy=f"give another ending, as {self._path.stem}.parquet (nothing is scored again), or keep fewer",
            )
        sheet.append([self.cell(sheet, cell) for cell in cells])

    def cell(self, sheet: Any, value: Any) -> Any:
        """A value, or a Cell of a source's workbook, as openpyxl writes it; None for an empty one."""
        from openpyxl.cell import WriteOnlyCell

        original = value if isinstance(value, Cell) else None
        plain = _sheet_value(value if original is None else original.value)
        if plain is None:
            return None
        if not isinstance(plain, str):
            cell = WriteOnlyCell(sheet, plain)
            if original is not None:
                cell.number_format = original.number_format
            return cell
        text = UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", plain)
        if len(text) > CELL:
            raise RequestError(
                f"a text of {len(text):,} characters doesn't fit into {self._path}",
                cause=f"an Excel cell holds {CELL:,}, and none is cut in silence",
                remedy="give another ending, as .parquet (nothing is scored again), or a rule on `length`",
            )
        self._done.replaced += text != plain
        cell = WriteOnlyCell(sheet, text)
        # openpyxl takes what begins with "=" for a formula, and a spreadsheet takes an id of digits for a number.
        cell.data_type = "e" if original is not None and original.data_type == "e" else "s"
        cell.number_format = original.number_format if original is not None else "@"
        cell.quotePrefix = text.startswith(FORMULA)  # so it stays a text when somebody edits the cell
        return cell


def _sheet_value(value: Any) -> Any:
    """A number, a truth value, a date or a text; None for an empty cell."""
    if isinstance(value, bool | timedelta) or (isinstance(value, datetime | time) and value.tzinfo is None):
        return value
    if isinstance(value, date) and not isinstance(value, datetime):
        return value
    if isinstance(value, int):
        return value if abs(value) <= EXACT else str(value)
    if isinstance(value, float | Decimal):
        return value if value == value and abs(value) != float("inf") else None
    return as_text(value)


class _OwnSheets:
    """The sheets of the one workbook that is the source, each with its own header."""

    def __init__(self, cells: _SheetCells, columns: SourceColumns, added: Sequence[str]) -> None:
        self._cells = cells
        self._tables = {table.name: table for table in columns.tables}
        self._sheets: dict[str, Any] = {}
        for table in columns.tables:
            if table.sheet:
                header = [*table.header_cells, *[None] * (table.width - len(table.header_cells)), *added]
                self._sheets[table.name] = cells.new_sheet(table.sheet, header)
        self._further = added

    def write(self, record: Original, added: Added) -> None:
        name = record.table.name
        if name not in self._sheets:  # of a workbook that can't be read to its end
            title = "unreadable" if "unreadable" not in self._cells.book.sheetnames else "unreadable records"
            self._sheets[name] = self._cells.new_sheet(title, self._further)
        width = self._tables[name].width if self._tables[name].sheet else 0
        padding = [None] * (width - len(record.cells))
        self._cells.append(self._sheets[name], [*record.cells, *padding, *map(added.get, self._further)])


class _OneSheet:
    """All records in one sheet, in the columns of all sources."""

    def __init__(self, cells: _SheetCells, names: Sequence[str], added: Sequence[str]) -> None:
        self._cells, self._names, self._further = cells, names, added
        self._sheet = cells.new_sheet("rows", [*names, *added])

    def write(self, record: Original, added: Added) -> None:
        values: dict[str, Any] = record.values()
        if record.table.kind == "xlsx":
            formats = zip(record.table.names, record.cells, strict=False)
            values |= {name: cell for name, cell in formats if name in values}
        self._cells.append(self._sheet, [*map(values.get, self._names), *map(added.get, self._further)])


@contextmanager
def _parquet(path: Path, columns: SourceColumns, added: Added, done: Written) -> Iterator[Writer]:
    schema = _schema(columns, added)
    with pq.ParquetWriter(path, schema) as file:
        tables = _Tables(file, schema, set(added))
        yield tables
        tables.flush()


def _schema(columns: SourceColumns, added: Added) -> Any:
    """The source's own where it has one, with fields' and file's metadata; else the columns of all sources."""
    further = [pa.field(name, kind) for name, kind in added.items()]
    own = [table.schema for table in columns.tables]
    if not own or any(schema is None or not schema.equals(own[0], check_metadata=True) for schema in own):
        return pa.schema([*(pa.field(name, kind) for name, kind in columns.types.items()), *further])
    if list(columns.types) != own[0].names:  # a name twice
        return pa.schema([*(pa.field(name, kind) for name, kind in columns.types.items()), *further])
    if not further:
        return own[0]
    metadata: dict[bytes | str, bytes | str] = dict(own[0].metadata or {})
    # Hugging Face's metadata names all columns: with further ones it would be wrong. Rows without columns are nulls.
    metadata.pop(b"huggingface", None)
    return pa.schema([*(item.with_nullable(True) for item in own[0]), *further], metadata)


class _Tables:
    """Rows in row groups: runs of rows of one Arrow batch are taken from it whole."""

    def __init__(self, file: Any, schema: Any, further: set[str]) -> None:
        self._file, self._schema, self._further = file, schema, further
        self._batch: Any = None
        self._indices: list[int] = []
        self._values: list[dict[str, Any]] = []
        self._added: list[Added] = []
        self._ready: list[Any] = []
        self._rows = self._bytes = 0

    def write(self, record: Original, added: Added) -> None:
        batch = record.batch if record.is_readable else None
        if self._added and (batch is not self._batch or len(self._added) == 1024):
            self._end_run()
        self._batch = batch
        if batch is None:
            self._values.append(record.values())
        else:
            self._indices.append(record.index)
        self._added.append(added)

    def flush(self) -> None:
        if self._added:
            self._end_run()
        if self._ready:
            self._file.write_table(pa.concat_tables(self._ready))
        self._ready, self._rows, self._bytes = [], 0, 0

    def _end_run(self) -> None:
        own: dict[str, Any] = {}
        if self._batch is not None:
            taken = self._batch.take(pa.array(self._indices))
            own = dict(zip(unique_names(self._batch.schema.names), taken.columns, strict=True))
        arrays = []
        for item in self._schema:
            if item.name in self._further:
                arrays.append(pa.array([added.get(item.name) for added in self._added], item.type))
            elif self._batch is None:
                arrays.append(_array([values.get(item.name) for values in self._values], item.type))
            elif item.name in own:
                arrays.append(_cast(own[item.name], item.type))
            else:
                arrays.append(pa.nulls(len(self._added), item.type))
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._ready.append(table)
        self._rows, self._bytes = self._rows + table.num_rows, self._bytes + table.nbytes
        self._indices, self._values, self._added, self._batch = [], [], [], None
        if self._rows >= ROW_GROUP or self._bytes >= ROW_GROUP_BYTES:
            self.flush()


def _array(values: list[Any], kind: Any) -> Any:
    return pa.array([as_text(value) for value in values] if pa.types.is_string(kind) else values, kind)


def _cast(column: Any, kind: Any) -> Any:
    if column.type == kind:
        return column
    try:
        return column.cast(kind)
    except (pa.ArrowException, NotImplementedError):
        return _array(column.to_pylist(), kind)


WRITERS: dict[str, Open] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _separated(","),
    ".tsv": _separated("\t"),
    ".xlsx": _xlsx,
    ".parquet": _parquet,
}
