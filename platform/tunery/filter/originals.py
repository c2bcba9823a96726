"""Original records of a source, with the types and the text that the row schema drops.

`tunery filter` decides on rows of the schema (store/rows.py) and writes the original records. Both are matched by
source and line, so the readers of ingest/formats determine the records and their line numbers: their records are read
again here, in parallel with the file's lines, cells or Arrow batches. Only one record or batch is in memory.
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
from tunery.ingest.sources import Builtin, resolve_sources
from tunery.spec import Dataset

Kind = Literal["json", "csv", "xlsx", "arrow", "values"]


class OriginalCell(NamedTuple):
    """A cell of a workbook: its value, openpyxl's code of its type, and its number format."""

    value: Any
    data_type: str
    number_format: str


EMPTY = OriginalCell(None, "n", "General")


@dataclass
class SourceTable:
    """Properties that the records of a file, or of a sheet of a workbook, share. Complete once all records have been
    read."""

    name: str
    """Name in the column `source` of rows."""
    kind: Kind
    header: list[str] = field(default_factory=list)
    """csv and xlsx: column names as written; "" for a column without a name."""
    delimiter: str = ""
    header_text: str = ""
    """csv: text of the header, without its line end."""
    line_end: str = "\n"
    has_bom: bool = False
    """csv: whether the file starts with a byte order mark, by which Excel recognizes UTF-8."""
    sheet: str = ""
    header_cells: Sequence[OriginalCell] = ()
    width: int = 0
    """xlsx: number of columns of the widest row."""
    schema: Any = None
    """arrow: the pyarrow schema."""

    @property
    def names(self) -> tuple[str, ...]:
        """Unique column names from the header; the third column is `column_3` if it has no name."""
        return _names(tuple(self.header), max(len(self.header), self.width))


@lru_cache(maxsize=64)
def _names(header: tuple[str, ...], width: int) -> tuple[str, ...]:
    named = (header[index].strip() if index < len(header) else "" for index in range(width))
    return tuple(unique_names(name or f"column_{number}" for number, name in enumerate(named, 1)))


def unique_names(names: Iterable[str]) -> list[str]:
    """Number repeated names: `a`, `a`, `b` become `a`, `a_2`, `b`."""
    result: dict[str, None] = {}
    for name in names:
        result[free_name(name, result)] = None
    return list(result)


def free_name(name: str, taken: Container[str]) -> str:
    """Return `name`, or the first of `name_2`, `name_3`, ... that is not taken."""
    number, free = 2, name
    while free in taken:
        free, number = f"{name}_{number}", number + 1
    return free


@dataclass(slots=True)
class Original:
    """An original record. The fields that are set depend on the kind of its table."""

    table: SourceTable
    line: int
    text: str = ""
    """json and csv: text of the record, without its line end. For an unreadable record, the text that is available."""
    is_readable: bool = True
    """Whether the record has columns."""
    record: Record | None = None
    cells: Sequence[OriginalCell] = ()
    batch: Any = None
    """arrow: the RecordBatch that contains the record, as row `index`."""
    index: int = 0

    def values(self) -> dict[str, Any]:
        """Return the values by column, with the types of the source (strings for CSV); {} for an unreadable record."""
        if not self.is_readable:
            return {}
        if self.table.kind == "json":
            values: dict[str, Any] = json.loads(self.text)
            return values
        if self.table.kind == "csv":
            return {name: cell or None for name, cell in zip(self.table.names, self.csv_cells(), strict=False)}
        if self.table.kind == "xlsx":
            named = zip(self.table.names, self.cells, strict=False)
            header = self.table.header
            # A column without a name is included only if it has a value.
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
        """Split the record into cells: as many as the header has, more if all extra cells are empty, or fewer for a
        short line."""
        table = self.table
        plain = self.text.split(table.delimiter)
        if '"' not in self.text:
            return plain
        # In most .tsv files a quote is an ordinary character; the reader decides for each line.
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
        # Python can't represent text that is not UTF-8, or a date in the year 300,000.
        if pa.types.is_string(scalar.type) or pa.types.is_large_string(scalar.type):
            return scalar.cast(pa.binary()).as_py().decode("utf-8", "backslashreplace")
        return str(scalar.cast(pa.string()))


def originals(stage: Dataset, folder: Path) -> Iterator[Original]:
    """Yield every record of the stage's sources, readable or not, in the order in which the stage reads them.

    Raises BadSource if a source can't be found, UnavailableFile if a file or the network fails while it is read.
    """
    for part in resolve_sources(stage, folder):
        assert not isinstance(part, Builtin), "a filter's source is files or a hub dataset"
        yield from originals_of(part, stage)


def originals_of(part: File | HubDataset, stage: Dataset) -> Iterator[Original]:
    """Yield the records of one file or hub dataset."""
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
    # The output is UTF-8, so bytes that are not UTF-8 are escaped.
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
        numbered_lines = _numbered_lines(_BomReader(stream, table))
        for record in records_of(file, stage):
            record_lines: list[bytes] = []
            num_more_lines = _text(record.raw).count("\n") if record.raw is not None else 0
            for number, line in numbered_lines:
                if number >= record.line:
                    record_lines.append(line)
                    if number == record.line + num_more_lines:
                        break
                elif not table.header and (header or line.strip()):
                    header.append(line)
            if header and not table.header:
                _read_header(table, header)
            text = _text(b"\n".join(record_lines)).removesuffix("\r")
            yield Original(table, record.line, text, isinstance(record.value, dict), record)
        if not table.header:
            _read_header(table, [*header, *(line for _, line in numbered_lines)])


class _BomReader:
    """A byte stream that sets `has_bom` of its table."""

    def __init__(self, stream: Bytes, table: SourceTable) -> None:
        self._stream, self._table, self._is_first = stream, table, True

    def read(self, size: int, /) -> bytes:
        piece = self._stream.read(size)
        if self._is_first:
            self._table.has_bom, self._is_first = piece.startswith(b"\xef\xbb\xbf"), False
        return piece


def _numbered_lines(stream: Bytes) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line); the line is b"" if it is too long. Stops where the file is corrupt."""
    try:
        for number, line in lines(stream):
            yield number, b"" if isinstance(line, InvalidRow) else line
    except CorruptFile:
        return


def _read_header(table: SourceTable, header: list[bytes]) -> None:
    while header and not header[-1].strip():
        header.pop()
    text = _text(b"\n".join(header))
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
    """Open the file with openpyxl. Yield None if it is not a workbook; the reader's records then have the reason."""
    import openpyxl

    with ExitStack() as stack:
        try:
            raw = stack.enter_context(open_seekable(file))
            book = openpyxl.load_workbook(raw, read_only=True, data_only=True)
        except UnavailableFile:
            raise
        except Exception:
            # openpyxl raises many kinds of errors (ingest/formats/excel.py).
            book = None
        else:
            stack.callback(book.close)
        yield book


class _Sheet:
    """Iterates over a sheet's rows in parallel with the reader's records."""

    def __init__(self, name: str, sheet: Any) -> None:
        self.table = SourceTable(name, "xlsx", sheet=sheet.title)
        # The <dimension> of a sheet may be wrong.
        sheet.reset_dimensions()
        self._rows = enumerate(sheet.iter_rows(), 1)
        self._last: dict[int, OriginalCell] = {}
        """Last nonempty cell by column index. A merged range has its value."""

    def row(self, record: Record) -> list[OriginalCell]:
        """Return the cells of the record's row. Rows before it that are not records are empty or the header."""
        for number, row in self._rows:
            cells = [_cell(cell) for cell in row]
            while cells and cells[-1].value is None:
                cells.pop()
            self.table.width = max(self.table.width, len(cells))
            self._last.update((index, cell) for index, cell in enumerate(cells) if cell.value is not None)
            if number == record.line:
                return self._fill_merged(cells, record)
            if cells and not self.table.header:
                self.table.header_cells = cells
                self.table.header = ["" if cell.value is None else str(cell_text(cell.value)) for cell in cells]
        return []

    def _fill_merged(self, cells: list[OriginalCell], record: Record) -> list[OriginalCell]:
        """Fill in the value of a cell merged over several rows, as the reader does."""
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
    """Join the lines of a JSON text. JSON strings contain no raw line ends, so every line end is between tokens."""
    return re.sub(r"[ \t\r]*\n[ \t\r]*", " ", text).strip() if "\n" in text or "\r" in text else text.strip()
