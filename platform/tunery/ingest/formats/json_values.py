"""JSON files that are no JSON lines: an array of records, or values one after another; parsed in pieces.

A value's end is found by its brackets and strings, and only then is it parsed: so a file of any size passes through a
window of a few records, and a value that is no JSON costs itself. Where brackets or quotes don't match, reading goes
on at the next line that starts as the first record's line did, by its white space and `{`; in a file that is all one
line there is none, and the rest of it is one quarantined record.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator

from tunery.ingest.filesystem import Bytes, File, open_stream
from tunery.ingest.formats.lines import CHUNK, parse
from tunery.ingest.formats.record import EXCERPT, LONGEST, InvalidRow, Record
from tunery.spec import Dataset

# A whole string, or a bracket, or the quote of a string that does not end on its line or within the window.
_TOKEN = re.compile(rb'"[^"\\\n]*+(?:\\[^\n][^"\\\n]*+)*+"|["\[\]{}]')
_BETWEEN = re.compile(rb"[\s,]*")
_SCALAR = re.compile(rb'[^\s,"\[\]{}]+')
_CLOSES = {b"]": b"[", b"}": b"{"}


def json_records(file: File, stage: Dataset) -> Iterator[Record]:
    """Elements of arrays at the top, and all other values at the top, numbered from 1."""
    with open_stream(file) as stream:
        window = _Window(stream)
        number, in_array = 0, False
        while head := window.next_value():
            if head == b"[" and not in_array:
                in_array, window.at = True, window.at + 1
            elif head == b"]" and in_array:
                in_array, window.at = False, window.at + 1
            else:
                number += 1
                value = window.take()
                yield Record(number, value, window.taken) if isinstance(value, InvalidRow) else _parsed(number, value)
        if in_array:
            yield Record(number + 1, InvalidRow("not JSON: the file ends within its array"))


def _parsed(number: int, value: bytes) -> Record:
    return Record(number, parse(value), value)


class _Window:
    """The part of a file that is looked at; `at` is where in `data` the next value starts."""

    def __init__(self, stream: Bytes) -> None:
        self._stream = stream
        self.data = b""
        self.at = 0
        self.taken = b""
        """The beginning of the last value taken."""
        self._ended = False
        self._start_of_record: bytes | None = None
        self._fill()
        self.data = self.data.removeprefix(codecs.BOM_UTF8)

    def next_value(self) -> bytes:
        """Skips what stands between values; the first byte of the next one, b"" at the end."""
        while True:
            match = _BETWEEN.match(self.data, self.at)
            assert match is not None, "it matches nothing too"
            if match.end() < len(self.data):
                break
            # White space is kept back to its last line, which tells how records are indented.
            self.at = max(self.at, self.data.rfind(b"\n"))
            if not self._fill():
                return b""
        self.at = match.end()
        return self.data[self.at : self.at + 1]

    def take(self) -> bytes | InvalidRow:
        """The value at `at`, whole; or why its end can't be told. `at` moves to what follows."""
        if self._start_of_record is None:
            line = self.data.rfind(b"\n", 0, self.at)
            indent = self.data[line + 1 : self.at]
            self._start_of_record = b"\n" + indent + b"{" if line >= 0 and not indent.strip() else b""
        found = self._end()
        end = self._next_record() if isinstance(found, InvalidRow) else self.at + found
        self.taken = self.data[self.at : min(end, self.at + 4 * EXCERPT)]
        value = found if isinstance(found, InvalidRow) else self.data[self.at : end]
        self.at = end
        return value

    def _end(self) -> int | InvalidRow:
        """Length of the value at `at`."""
        if self.data[self.at : self.at + 1] not in (b'"', b"[", b"{"):
            return self._end_of_scalar()
        open_brackets: list[bytes] = []
        length = 0
        while True:
            token = _TOKEN.search(self.data, self.at + length)
            if token is None:
                length = len(self.data) - self.at
            elif token[0] != b'"':
                length = token.end() - self.at
                if token[0] in _CLOSES:
                    if not open_brackets or open_brackets.pop() != _CLOSES[token[0]]:
                        return InvalidRow(f"not JSON: a `{token[0].decode()}` closes what was not opened")
                elif token[0] in (b"[", b"{"):
                    open_brackets.append(token[0])
                if not open_brackets:
                    return length
                continue
            else:
                length = token.start() - self.at
                if self.data.find(b"\n", token.start()) >= 0:
                    return InvalidRow("not JSON: a string is not closed on its line")
            if len(self.data) - self.at > LONGEST:
                return InvalidRow(f"a record of more than {LONGEST:,} bytes, or its brackets don't match")
            if not self._fill():
                return InvalidRow("not JSON: the file ends within a value")

    def _end_of_scalar(self) -> int:
        while True:
            match = _SCALAR.match(self.data, self.at)
            if match is None:
                return 1  # a bracket out of place
            if match.end() < len(self.data) or match.end() - self.at > LONGEST or not self._fill():
                return match.end() - self.at

    def _next_record(self) -> int:
        """Where the record after a broken one starts, or the file's end."""
        if not self._start_of_record:
            while self._fill(keep=4 * EXCERPT):
                pass
            return len(self.data)
        seen = 1
        while (found := self.data.find(self._start_of_record, self.at + seen)) < 0:
            seen = max(1, len(self.data) - self.at - len(self._start_of_record))
            if not self._fill():
                return len(self.data)
        return found + 1

    def _fill(self, keep: int | None = None) -> bool:
        """Drops what is behind `at` and reads as much again as is left, so that the work stays linear. False at the
        file's end. With `keep` only so many bytes from `at` on stay."""
        rest = self.data[self.at :][:keep]
        more = b"" if self._ended else self._stream.read(max(CHUNK, len(rest)))
        self._ended = not more
        if more:
            self.data, self.at = rest + more, 0
        return not self._ended
