"""Records of a source as they are in its files, with the types and the text that the row schema drops.

`tunery filter` decides on rows of the schema (store/rows.py) and writes the original records. Both are matched by
source and line, so what is a record, and which line it has, is left to the readers of ingest/formats: here their
records are read again, side by side with the file's own lines, cells or Arrow batches. One record, or one batch, is in
memory.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa

from tunery.ingest.filesystem import Bytes, CorruptFile, File, UnavailableFile, open_seekable, open_stream
from tunery.ingest.formats import format_of
from tunery.ingest.formats.arrow import arrow_batches, parquet_batches
from tunery.ingest.formats.delimited import delimiter_of
from tunery.ingest.formats.hub import HubDataset, raw_hub_rows
from tunery.ingest.formats.lines import lines
from tunery.ingest.formats.record import InvalidRow, Record, cell_text
from tunery.ingest.read import records_of
from tunery.ingest.sources import Builtin, find_parts
from tunery.spec import Dataset

Kind = Literal["json", "csv", "xlsx", "arrow", "values"]


class OriginalCell(NamedTuple):
    """A cell of a workbook: its value, openpyxl's letter for its type, and how it is displayed."""

    value: Any
    data_type: str
    number_format: str


EMPTY = OriginalCell(None, "n", "General")


@dataclass
class SourceTable:
    """A file, or a sheet of a workbook: what all its records share. Complete once they have been read."""

    name: str
    """As rows have it in `source`."""
    kind: Kind
    header: list[str] = field(default_factory=list)
    """Of csv and xlsx: the names as they are written, "" where a column has none."""
    delimiter: str = ""
    header_text: str = ""
    """Of csv: the header's own text, without its line end."""
    line_end: str = "\n"
    has_bom: bool = False
    """Of csv: the file begins with UTF-8's byte order mark, by which Excel knows it."""
    sheet: str = ""
    header_cells: Sequence[OriginalCell] = ()
    width: int = 0
    """Of xlsx: columns of the widest row."""
    schema: Any = None
    """Of Arrow files: the pyarrow schema."""

    @property
    def names(self) -> tuple[str, ...]:
        """The header, each name once; a column without a name is `column_3`."""
        return _names(tuple(self.header), max(len(self.header), self.width))


@lru_cache(maxsize=64)
def _names(header: tuple[str, ...], width: int) -> tuple[str, ...]:
    named = (header[index].strip() if index < len(header) else "" for index in range(width))
    return tuple(unique_names(name or f"column_{number}" for number, name in enumerate(named, 1)))


def unique_names(names: Iterable[str]) -> list[str]:
    """`a`, `a`, `b` as `a`, `a_2`, `b`."""
    found: dict[str, None] = {}
    for name in names:
        found[free_name(name, found)] = None
    return list(found)


def free_name(name: str, taken: Container[str]) -> str:
    """`name`, or the first of `name_2`, `name_3` that is not taken."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


@dataclass(slots=True)
class Original:
    """One record. What it holds besides its values depends on its table's kind."""

    table: SourceTable
    line: int
    text: str = ""
    """Of JSON and CSV its text, without the line end; of a record that can't be read as much as there is."""
    is_readable: bool = True
    """It has columns."""
    record: Record | None = None
    cells: Sequence[OriginalCell] = ()
    batch: Any = None
    """Of Arrow files: the RecordBatch that holds it, as row `index`."""
    index: int = 0

    def values(self) -> dict[str, Any]:
        """Column: value, with the types of the source (texts in a CSV); {} where it can't be read."""
        if not self.is_readable:
            return {}
        if self.table.kind == "json":
            found: dict[str, Any] = json.loads(self.text)
            return found
        if self.table.kind == "csv":
            return {name: cell or None for name, cell in zip(self.table.names, self.csv_cells(), strict=False)}
        if self.table.kind == "xlsx":
            named = zip(self.table.names, self.cells, strict=False)
            header = self.table.header
            # A column without a name counts where it holds something.
            return {
                name: cell.value
                for index, (name, cell) in enumerate(named)
                if cell.value is not None or (index < len(header) and header[index])
            }
        if self.table.kind == "arrow":
            return {
                name: _scalar(column[self.index])
                for name, column in zip(unique_names(self.batch.schema.names), self.batch.columns, strict=True)
            }
        assert self.record is not None, "rows of the hub and plain texts have their values in the record"
        return dict(self.record.value)

    def csv_cells(self) -> list[str]:
        """As many as the header has, or more where all further ones are empty; fewer in a short line."""
        table = self.table
        plain = self.text.split(table.delimiter)
        if '"' not in self.text:
            return plain
        # In most .tsv files a quote is a character like another: the reader decides line by line.
        value = self.record.value if self.record is not None else None
        is_plain = isinstance(value, dict) and [cell or None for cell in plain] == list(value.values())
        if table.delimiter == "\t" and is_plain:
            return plain
        try:
            return next(csv.reader([f"{line}\n" for line in self.text.split("\n")], delimiter=table.delimiter))
        except (csv.Error, StopIteration):
            return plain


def _scalar(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except (ValueError, OverflowError):
        # A text that is no UTF-8, a date in the year 300,000: no value of Python's.
        if pa.types.is_string(scalar.type) or pa.types.is_large_string(scalar.type):
            return scalar.cast(pa.binary()).as_py().decode("utf-8", "backslashreplace")
        return str(scalar.cast(pa.string()))


def originals(stage: Dataset, folder: Path) -> Iterator[Original]:
    """Every record of the stage's sources, readable or not, in the order in which the stage reads them.

    Raises BadSource when a source can't be found, UnavailableFile when a file or the network fails under way.
    """
    for part in find_parts(stage, folder):
        assert not isinstance(part, Builtin), "a filter's source is files or a hub dataset"
        yield from originals_of(part, stage)


def originals_of(part: File | HubDataset, stage: Dataset) -> Iterator[Original]:
    """The records of one file or hub dataset."""
    if isinstance(part, HubDataset):
        table = SourceTable(part.name, "values")
        for number, row in enumerate(raw_hub_rows(part), 1):
            yield Original(table, number, record=Record(number, row))
        return
    format_ = format_of(part, stage)
    if format_ in ("csv", "tsv"):
        yield from _csv(part, stage, "\t" if format_ == "tsv" else "")
    elif format_ == "xlsx":
        yield from _xlsx(part, stage)
    elif format_ in ("parquet", "arrow"):
        yield from _arrow(part, parquet_batches(part) if format_ == "parquet" else arrow_batches(part))
    else:
        table = SourceTable(part.name, "values" if format_ == "text" else "json")
        for record in records_of(part, stage):
            yield Original(table, record.line, _text(record.raw), isinstance(record.value, dict), record)


def _text(raw: bytes | str | None) -> str:
    # Bytes that are no UTF-8 stay visible: what is written is UTF-8.
    return raw.decode("utf-8", "backslashreplace") if isinstance(raw, bytes) else raw or ""


def _arrow(file: File, batches: Iterator[tuple[int, Any]]) -> Iterator[Original]:
    table = SourceTable(file.name, "arrow")
    line = 0
    try:
        for line, batch in batches:
            if isinstance(batch, InvalidRow):
                yield Original(table, line, is_readable=False)
                continue
            table.schema = batch.schema
            for index in range(batch.num_rows):
                yield Original(table, line + index, batch=batch, index=index)
            line += batch.num_rows - 1
    except CorruptFile:
        yield Original(table, line + 1, is_readable=False)


def _csv(file: File, stage: Dataset, delimiter: str) -> Iterator[Original]:
    table = SourceTable(file.name, "csv", delimiter=delimiter)
    header: list[bytes] = []
    with open_stream(file) as stream:
        physical = _physical(_Marked(stream, table))
        for record in records_of(file, stage):
            taken: list[bytes] = []
            more = _text(record.raw).count("\n") if record.raw is not None else 0
            for number, line in physical:
                if number >= record.line:
                    taken.append(line)
                    if number == record.line + more:
                        break
                elif not table.header and (header or line.strip()):
                    header.append(line)
            if header and not table.header:
                _read_header(table, header)
            text = _text(b"\n".join(taken)).removesuffix("\r")
            yield Original(table, record.line, text, isinstance(record.value, dict), record)
        if not table.header:
            _read_header(table, [*header, *(line for _, line in physical)])


class _Marked:
    """Bytes of a stream; whether they begin with a byte order mark is kept with the table."""

    def __init__(self, stream: Bytes, table: SourceTable) -> None:
        self._stream, self._table, self._is_first = stream, table, True

    def read(self, size: int, /) -> bytes:
        piece = self._stream.read(size)
        if self._is_first:
            self._table.has_bom, self._is_first = piece.startswith(b"\xef\xbb\xbf"), False
        return piece


def _physical(stream: Bytes) -> Iterator[tuple[int, bytes]]:
    """Lines by number; b"" for one that is too long. Ends where the file is damaged."""
    try:
        for number, line in lines(stream):
            yield number, b"" if isinstance(line, InvalidRow) else line
    except CorruptFile:
        return


def _read_header(table: SourceTable, found: list[bytes]) -> None:
    while found and not found[-1].strip():
        found.pop()
    text = _text(b"\n".join(found))
    table.line_end = "\r\n" if text.endswith("\r") else "\n"
    table.header_text = text.removesuffix("\r")
    table.delimiter = table.delimiter or delimiter_of(table.header_text)
    if table.header_text:
        pieces = [f"{line}\n" for line in table.header_text.split("\n")]
        table.header = next(csv.reader(pieces, delimiter=table.delimiter))


def _xlsx(file: File, stage: Dataset) -> Iterator[Original]:
    sheets: dict[str, _Sheet] = {}
    unknown = SourceTable(file.name, "xlsx")
    with _workbook(file) as book:
        for record in records_of(file, stage):
            if not record.part or book is None:
                yield Original(unknown, record.line, _text(record.raw), False, record)
                continue
            if record.part not in sheets:
                sheets[record.part] = _Sheet(f"{file.name}#{record.part}", book[record.part])
            sheet = sheets[record.part]
            cells = sheet.row(record)
            yield Original(sheet.table, record.line, _text(record.raw), bool(sheet.table.header), record, cells)


@contextmanager
def _workbook(file: File) -> Iterator[Any]:
    """openpyxl's workbook; None where the file is none, which the reader's records say with a reason."""
    import openpyxl

    with ExitStack() as stack:
        try:
            raw = stack.enter_context(open_seekable(file))
            book = openpyxl.load_workbook(raw, read_only=True, data_only=True)
        except UnavailableFile:
            raise
        except Exception:
            # As in ingest/formats/excel.py: openpyxl lets errors of every kind through.
            book = None
        else:
            stack.callback(book.close)
        yield book


class _Sheet:
    """A sheet's rows beside the reader's records of it."""

    def __init__(self, name: str, sheet: Any) -> None:
        self.table = SourceTable(name, "xlsx", sheet=sheet.title)
        # A workbook's own <dimension> may be wrong.
        sheet.reset_dimensions()
        self._rows = enumerate(sheet.iter_rows(), 1)
        self._last: dict[int, OriginalCell] = {}
        """By column: the last cell that holds something, which is the one that a merged range shows."""

    def row(self, record: Record) -> list[OriginalCell]:
        """The cells of the record's row; rows before it that are no records are empty, or the header."""
        for number, row in self._rows:
            cells = [_cell(cell) for cell in row]
            while cells and cells[-1].value is None:
                cells.pop()
            self.table.width = max(self.table.width, len(cells))
            self._last.update((index, cell) for index, cell in enumerate(cells) if cell.value is not None)
            if number == record.line:
                return self._filled(cells, record)
            if cells and not self.table.header:
                self.table.header_cells = cells
                self.table.header = ["" if cell.value is None else str(cell_text(cell.value)) for cell in cells]
        return []

    def _filled(self, cells: list[OriginalCell], record: Record) -> list[OriginalCell]:
        """A value merged over several rows is in each of them, as the reader has it."""
        if not isinstance(record.value, dict):
            return cells
        for index, name in enumerate(self.table.header):
            is_empty = index >= len(cells) or cells[index].value is None
            if is_empty and name.strip() and record.value.get(name.strip()) is not None and index in self._last:
                cells += [EMPTY] * (index + 1 - len(cells))
                cells[index] = self._last[index]
        return cells


def _cell(cell: Any) -> OriginalCell:
    if cell.value is None or cell.value == "":
        return EMPTY
    return OriginalCell(cell.value, cell.data_type, cell.number_format)


def one_line(text: str) -> str:
    """JSON text without line ends: a JSON string holds none, so each of them is between tokens."""
    return re.sub(r"[ \t\r]*\n[ \t\r]*", " ", text).strip() if "\n" in text or "\r" in text else text.strip()
