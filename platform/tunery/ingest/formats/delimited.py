"""CSV and TSV files: a header, then a record a line or, where a quoted cell holds line ends, over several lines.

Cells are divided by `,` in .csv (or by `;`, a tab or `|` where the header has more of them) and by tabs in .tsv, and
quoted by `"` as RFC 4180 has it. A quote that is opened and never properly closed would swallow the rows below it: it
costs its own line only, and reading goes on at the next. A first line `sep=;`, as Excel reads it, names the delimiter.
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from itertools import zip_longest

from tunery.ingest.filesystem import CorruptFile, File, open_stream
from tunery.ingest.formats.lines import lines
from tunery.ingest.formats.record import LONGEST, InvalidRow, Record, from_pairs
from tunery.spec import Dataset

DELIMITERS = (",", ";", "\t", "|")

_CLOSING = re.compile(r'(?:[^"]|"")*+"')
_HINT = re.compile(r'"?sep=([^"])"?\1*', re.IGNORECASE)
"""Excel adds the delimiter once a column when it saves a file with the hint again."""
_NOT_UTF8 = re.compile("[\udc80-\udcff]")

Line = tuple[int, str | InvalidRow]


def comma_separated(file: File, stage: Dataset) -> Iterator[Record]:
    return _records(file, None)


def tab_separated(file: File, stage: Dataset) -> Iterator[Record]:
    return _records(file, "\t")


def _records(file: File, delimiter: str | None) -> Iterator[Record]:
    # csv's own limit of 131,072 characters a cell would refuse long texts; `lines` limits them already.
    csv.field_size_limit(max(csv.field_size_limit(), LONGEST))
    with open_stream(file) as stream:
        rows = _Rows((number, _decoded(line)) for number, line in lines(stream))
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
                    rows.again(number, text)
                    continue
                header = [name.strip().encode("utf-8", "surrogateescape").decode("utf-8", "replace") for name in cells]
            else:
                yield Record(number, _row(header, cells), text)


def _decoded(line: bytes | InvalidRow) -> str | InvalidRow:
    # Bytes that are no UTF-8 become lone surrogates, so that they are found in the cell that holds them.
    return line if isinstance(line, InvalidRow) else line.decode("utf-8", "surrogateescape").removesuffix("\r")


def delimiter_of(header: str) -> str:
    """The delimiter of a .csv file, by its header."""
    outside = re.sub(r'"(?:[^"]|"")*"', "", header)
    return max(DELIMITERS, key=outside.count)


def _row(header: list[str], cells: list[str]) -> dict[str, object] | InvalidRow:
    if len(cells) > len(header) and any(cells[len(header) :]):
        return InvalidRow(f"{len(cells)} cells, and the header has {len(header)}")
    for name, cell in zip(header, cells, strict=False):
        if found := _NOT_UTF8.search(cell):
            return InvalidRow(f"not UTF-8: byte {ord(found[0]) - 0xDC00:#04x} in column `{name}`")
        if "\0" in cell:
            return InvalidRow(f"column `{name}` holds a NUL byte")
    return from_pairs(list(zip_longest(header, (cell or None for cell in cells[: len(header)]))))


class _Rows:
    """From lines to cells; looks ahead over the lines of a quoted cell, and gives them back when that was wrong."""

    def __init__(self, source: Iterator[Line]) -> None:
        self._source = source
        self._ahead: deque[Line] = deque()

    def again(self, number: int, text: str) -> None:
        """Read a row anew, by another delimiter."""
        start = number
        self._ahead.extendleft(reversed([(start + index, line) for index, line in enumerate(text.split("\n"))]))

    def next(self, delimiter: str | None, columns: int | None) -> tuple[int, str, list[str] | InvalidRow] | None:
        """(number of its first line, its text, its cells or what is wrong) of the next row; None at the end."""
        while (line := self._line()) is not None:
            number, text = line
            if isinstance(text, InvalidRow):
                return number, "", text
            if text.strip():
                return self._row(number, text, delimiter or ",", columns)
        return None

    def _line(self) -> Line | None:
        return self._ahead.popleft() if self._ahead else next(self._source, None)

    def _row(
        self, number: int, text: str, delimiter: str, columns: int | None
    ) -> tuple[int, str, list[str] | InvalidRow]:
        taken: list[Line] = [(number, text)]
        reason = "a quoted cell is not closed, or text follows its closing quote"
        size = len(text)
        state = _quotes(text, delimiter, False)
        while state == "open" and size < LONGEST and (line := self._line()) is not None:
            taken.append(line)
            if isinstance(line[1], InvalidRow):
                break
            size += len(line[1])
            state = _quotes(line[1], delimiter, True)
        if state == "closed":
            written = [str(line) for _, line in taken]
            try:
                cells = next(csv.reader([f"{line}\n" for line in written], delimiter=delimiter))
            except csv.Error as error:  # a carriage return within a line
                cells = []
                reason = f"not CSV: {error}"
            if cells and (len(taken) == 1 or columns in (None, len(cells))):
                return number, "\n".join(written), cells
        self._ahead.extendleft(reversed(taken[1:]))
        plain = text.split(delimiter)
        if delimiter == "\t" and len(plain) == columns:
            return number, text, plain  # in most .tsv files a quote is a character like another
        return number, text, InvalidRow(reason)


def _quotes(line: str, delimiter: str, inside: bool) -> str:
    """How a line leaves the cell at its end: "closed", "open" within quotes, or "wrong" where a closing quote is not
    the end of its cell. `inside` says that it begins within quotes."""
    if '"' not in line:
        return "open" if inside else "closed"
    at = 0
    while True:
        if inside or line.startswith('"', at):
            closing = _CLOSING.match(line, at if inside else at + 1)
            if closing is None:
                return "open"
            at, inside = closing.end(), False
            if at == len(line):
                return "closed"
            if not line.startswith(delimiter, at):
                return "wrong"
        else:
            at = line.find(delimiter, at)
            if at < 0:
                return "closed"
        at += 1
