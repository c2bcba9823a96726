"""Read Excel workbooks (.xlsx, .xlsm): all sheets, or the one set by `sheet`; each has a header and a record per row.

The value of a cell merged over several rows applies to each of them (one question, several answers); merged over
several columns, it applies to the first. A formula has the value that Excel computed last; a row with a formula that
was never computed, or with an error such as #N/A, is invalid. Numbers and dates become text (record.cell_text). Rows
are streamed, but openpyxl holds the table of all strings of the workbook in memory.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from contextlib import closing
from itertools import zip_longest
from typing import IO, Any

from tunery.ingest.filesystem import CorruptFile, File, UnavailableFile, open_seekable
from tunery.ingest.formats.record import InvalidRow, Record, cell_text, from_pairs
from tunery.spec import Dataset

FORMULA_PREFIXES = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")
"""Starts of a text that a spreadsheet may take for a formula when it is edited or exported, full-width signs included
(https://owasp.org/www-community/attacks/CSV_Injection)."""
MAX_COLUMNS = 2_048
"""Maximum number of columns of a header. Every row is padded to its header, so a small file with Excel's 16,384 columns
and a million rows would take hours."""
MAX_UNPACKED_BYTES = 2 << 30
"""Maximum size of the unpacked parts of a workbook: a million rows of 1 kB, twice."""
_MERGED = re.compile(rb'<(?:\w+:)?mergeCell\s[^>]*?ref="([A-Z]+)(\d+):[A-Z]+(\d+)"')
_FORMULA = re.compile(rb"<(?:\w+:)?f[\s/>]")
_MAX_TAG_BYTES = 200
"""Bytes that chunks of XML overlap, so that a tag across their boundary is found."""


def workbook(file: File, stage: Dataset) -> Iterator[Record]:
    """Yield the records of a workbook. Raises CorruptFile if the file is not a workbook or has no sheet with the
    requested name."""
    with open_seekable(file) as raw:
        try:
            yield from _sheets(raw, stage.sheet)
        except (CorruptFile, UnavailableFile):
            raise
        except Exception as error:
            # openpyxl and its dependencies raise KeyError, TypeError, BadZipFile and many other errors.
            hint = "; an .xls file, or one with a password, is not an .xlsx file" if "zip" in str(error).lower() else ""
            raise CorruptFile(f"not a readable Excel workbook: {type(error).__name__}: {error}{hint}") from error


def _sheets(raw: IO[bytes], sheet_name: str | None) -> Iterator[Record]:
    import openpyxl

    with zipfile.ZipFile(raw) as archive:
        unpacked = sum(part.file_size for part in archive.infolist())
    if unpacked > MAX_UNPACKED_BYTES:
        raise CorruptFile(f"the workbook has {unpacked:,} bytes unpacked, at most {MAX_UNPACKED_BYTES:,} are read")
    with closing(openpyxl.load_workbook(raw, read_only=True, data_only=True)) as values:
        if sheet_name is not None and sheet_name not in values.sheetnames:
            raise CorruptFile(f"there is no sheet `{sheet_name}`; sheets: {', '.join(values.sheetnames)}")
        for sheet in values.worksheets:
            if sheet_name in (None, sheet.title):
                yield from _rows(raw, sheet)


def all_rows(sheet: Any, values_only: bool = False) -> Iterator[Any]:
    """Yield a tuple of the cells of each row, from row 1 and column 1 to the last cell of the row.

    The <dimension> of a sheet is ignored: several programs write a wrong one, and openpyxl's read-only mode (3.1) would
    silently omit all cells beyond it.
    """
    sheet.reset_dimensions()
    return iter(sheet.iter_rows(values_only=values_only))


def _rows(raw: IO[bytes], sheet: Any) -> Iterator[Record]:
    from openpyxl.cell.read_only import EMPTY_CELL

    merged, has_formulas = _layout(sheet)
    merged_values: dict[int, tuple[int, Any]] = {}
    formulas = _formulas(raw, sheet.title) if has_formulas else None
    header: list[str] | None = None
    for number, row in enumerate(all_rows(sheet), 1):
        is_formula = next(formulas, ()) if formulas else ()
        if not row:  # without cells of its own; there may be a million before the last row
            continue
        cells: list[Any] = []
        error = ""
        # A row ends with its last cell; missing cells below the header are empty, or merged with a cell above.
        absent = max(0, len(header or ()) - len(row))
        for column, cell in enumerate((*row, *(EMPTY_CELL,) * absent), 1):
            value = cell.value
            if column <= len(is_formula) and is_formula[column - 1] and value is None:
                error = (
                    error
                    or f"the formula in {_name(column)}{number} has no cached value: open the file in Excel and save it"
                )
            elif cell.data_type == "e":
                error = error or f"the error {value} in {_name(column)}{number}"
            if (column, number) in merged:
                merged_values[column] = merged[column, number], value
            last, shared = merged_values.get(column, (0, None))
            cells.append(shared if number <= last else value)
        if error:
            yield Record(number, InvalidRow(error), _excerpt(cells), sheet.title)
        elif all(value is None or value == "" for value in cells):
            continue
        elif header is None:
            header = ["" if value is None else str(cell_text(value)).strip() for value in cells]
            if len(header) > MAX_COLUMNS:
                raise CorruptFile(f"the header has {len(header):,} columns, at most {MAX_COLUMNS:,} are read")
        else:
            # Keep values of columns without a name, so that they are counted as not read.
            columns = zip_longest(header, cells, fillvalue="")
            pairs = [(name, cell_text(value) or None) for name, value in columns if name or value not in (None, "")]
            yield Record(number, from_pairs(pairs), _excerpt(cells), sheet.title)


def _layout(sheet: Any) -> tuple[dict[tuple[int, int], int], bool]:
    """Return the last row of each range merged over rows, by (column, first row), and whether the sheet has formulas.
    Read from the sheet's XML, since openpyxl reports merged cells only for workbooks that it loads completely."""
    from openpyxl.utils import column_index_from_string

    merged: dict[tuple[int, int], int] = {}
    has_formulas = False
    with sheet._get_source() as source:
        before = b""
        while piece := source.read(1 << 20):
            text = before + piece
            for match in _MERGED.finditer(text):
                first, last = int(match[2]), int(match[3])
                if last > first:
                    merged[column_index_from_string(match[1].decode()), first] = last
            has_formulas = has_formulas or _FORMULA.search(text) is not None
            before = text[-_MAX_TAG_BYTES:]
    return merged, has_formulas


def _formulas(raw: IO[bytes], title: str) -> Iterator[tuple[bool, ...]]:
    """Yield which cells of each row have a formula. The workbook is opened again, since openpyxl returns either
    formulas or their values."""
    import openpyxl

    with closing(openpyxl.load_workbook(raw, read_only=True)) as book:
        for row in all_rows(book[title]):
            yield tuple(cell.data_type == "f" for cell in row)


def _name(column: int) -> str:
    from openpyxl.utils import get_column_letter

    return str(get_column_letter(column))


def _excerpt(cells: list[Any]) -> str:
    return " | ".join("" if value is None else str(value) for value in cells)[:1000]
