"""CSV and TSV files: a header, then one record per line, or over several lines if a quoted cell contains line ends.

Cells are separated by `,` in .csv (or by `;`, a tab or `|` if the header contains more of them) and by tabs in .tsv,
and quoted with `"` as in RFC 4180. A quote that is never closed would consume the following rows; only its own line is
invalid, and reading continues at the next. A first line such as `sep=;`, as used by Excel, sets the delimiter.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from itertools import zip_longest

from tunery.ingest.filesystem import CorruptFile, File, open_stream
from tunery.ingest.formats.lines import lines
from tunery.ingest.formats.record import MAX_RECORD_BYTES, InvalidRow, Record, from_pairs
from tunery.spec import Dataset

DELIMITERS = (",", ";", "\t", "|")

_CLOSING = re.compile(r'(?:[^"]|"")*+"')
_HINT = re.compile(r'"?sep=([^"])"?\1*', re.IGNORECASE)
"""When Excel saves a file with the hint again, it repeats the delimiter once per column."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")

Line = tuple[int, str | InvalidRow]


def comma_separated(file: File, stage: Dataset) -> Iterator[Record]:
    return _records(file, None)


def tab_separated(file: File, stage: Dataset) -> Iterator[Record]:
    return _records(file, "\t")


def _records(file: File, delimiter: str | None) -> Iterator[Record]:
    # The default limit of 131,072 characters per cell would reject long texts; `lines` already limits their length.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_RECORD_BYTES))
    with open_stream(file) as stream:
        rows = _RowReader((number, _decode(line)) for number, line in lines(stream))
        header: list[str] | None = None
        first = True
        while (row := rows.next(delimiter, len(header) if header else None)) is not None:
            number, text, cells = row
            hint, first = _HINT.fullmatch(text) if first else None, False
            if hint is not None:
                delimiter = hint[1]
            elif isinstance(cells, InvalidRow):
                yield Record(number, cells, text)
            elif header is None and text.startswith(("\udcff\udcfe", "\udcfe\udcff")):
                raise CorruptFile("it looks like UTF-16: save the file as UTF-8")
            elif header is None:
                if delimiter is None and (delimiter := delimiter_of(text)) != ",":
                    rows.push_back(number, text)
                    continue
                header = [name.strip().encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in cells]
            else:
                yield Record(number, _row(header, cells), text)


def _decode(line: bytes | InvalidRow) -> str | InvalidRow:
    # Invalid UTF-8 becomes lone surrogates, so that it can be reported with its column.
    return line if isinstance(line, InvalidRow) else line.decode("utf-8", "surrogateescape").removesuffix("\r")


def delimiter_of(header: str) -> str:
    """Return the delimiter of a .csv file, detected from its header."""
    unquoted = re.sub(r'"(?:[^"]|"")*"', "", header)
    return max(DELIMITERS, key=unquoted.count)


def _row(header: list[str], cells: list[str]) -> dict[str, object] | InvalidRow:
    if len(cells) > len(header) and any(cells[len(header) :]):
        return InvalidRow(f"{len(cells)} cells, but the header has {len(header)}")
    for name, cell in zip(header, cells, strict=False):
        if match := _NOT_UTF8.search(cell):
            return InvalidRow(f"not UTF-8: byte {ord(match[0]) - 0xDC00:#04x} in column `{name}`")
        if "\0" in cell:
            return InvalidRow(f"column `{name}` contains a NUL byte")
    return from_pairs(list(zip_longest(header, (cell or None for cell in cells[: len(header)]))))


class _RowReader:
    """Splits lines into cells; looks ahead over the lines of a quoted cell, and pushes them back if it is never
    closed."""

    def __init__(self, source: Iterator[Line]) -> None:
        self._source = source
        self._lookahead: deque[Line] = deque()

    def push_back(self, number: int, text: str) -> None:
        """Push a row back, to read it again with another delimiter."""
        lines_of_row = [(number + index, line) for index, line in enumerate(text.split("\n"))]
        self._lookahead.extendleft(reversed(lines_of_row))

    def next(self, delimiter: str | None, columns: int | None) -> tuple[int, str, list[str] | InvalidRow] | None:
        """Return (number of its first line, text, cells or error) of the next row; None at the end."""
        while (line := self._line()) is not None:
            number, text = line
            if isinstance(text, InvalidRow):
                return number, "", text
            if text.strip():
                return self._row(number, text, delimiter or ",", columns)
        return None

    def _line(self) -> Line | None:
        return self._lookahead.popleft() if self._lookahead else next(self._source, None)

    def _row(
        self, number: int, text: str, delimiter: str, columns: int | None
    ) -> tuple[int, str, list[str] | InvalidRow]:
        consumed: list[Line] = [(number, text)]
        reason = "a quoted cell is not closed, or text follows its closing quote"
        size = len(text)
        state = _quote_state(text, delimiter, False)
        while state == "open" and size < MAX_RECORD_BYTES and (line := self._line()) is not None:
            consumed.append(line)
            if isinstance(line[1], InvalidRow):
                break
            size += len(line[1])
            state = _quote_state(line[1], delimiter, True)
        if state == "closed":
            row_lines = [str(line) for _, line in consumed]
            try:
                cells = next(csv.reader([f"{line}\n" for line in row_lines], delimiter=delimiter))
            except csv.Error as error:  # a carriage return within a line
                cells = []
                reason = f"not CSV: {error}"
            if cells and (len(consumed) == 1 or columns in (None, len(cells))):
                return number, "\n".join(row_lines), cells
        self._lookahead.extendleft(reversed(consumed[1:]))
        unquoted_cells = text.split(delimiter)
        if delimiter == "\t" and len(unquoted_cells) == columns:
            return number, text, unquoted_cells  # in most .tsv files a quote has no special meaning
        return number, text, InvalidRow(reason)


def _quote_state(line: str, delimiter: str, inside: bool) -> str:
    """Return the quote state at the end of a line: "closed", "open", or "invalid" if text follows a closing quote.
    `inside` is whether the line begins within quotes."""
    if '"' not in line:
        return "open" if inside else "closed"
    position = 0
    while True:
        if inside or line.startswith('"', position):
            closing = _CLOSING.match(line, position if inside else position + 1)
            if closing is None:
                return "open"
            position, inside = closing.end(), False
            if position == len(line):
                return "closed"
            if not line.startswith(delimiter, position):
                return "invalid"
        else:
            position = line.find(delimiter, position)
            if position < 0:
                return "closed"
        position += 1
