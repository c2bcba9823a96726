"""Lines of a file, and JSON lines. One bad line costs that line."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from tunery.ingest.filesystem import Bytes, File, open_stream
from tunery.ingest.formats.record import EXCERPT, LONGEST, InvalidRow, Record, from_pairs
from tunery.spec import Dataset

CHUNK = 1 << 20


def lines(stream: Bytes) -> Iterator[tuple[int, bytes | InvalidRow]]:
    """(number, line without its `\\n`) from 1 on; no byte order mark. A line longer than LONGEST is a InvalidRow.

    When the stream raises Damaged, the lines before the damage have been given.
    """
    number, parts, size = 1, [], 0
    first = True
    while chunk := stream.read(CHUNK):
        if first:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
            first = False
        *whole, rest = chunk.split(b"\n")
        for end in whole:
            parts.append(end)
            yield number, _joined(parts, size + len(end))
            number, parts, size = number + 1, [], 0
        size += len(rest)
        parts = [*parts, rest] if size <= LONGEST else [b"".join(parts)[: 4 * EXCERPT]]
    if size:
        yield number, _joined(parts, size)


def _joined(parts: list[bytes], size: int) -> bytes | InvalidRow:
    if size > LONGEST:
        return InvalidRow(f"a line of {size:,} bytes: the longest that is read has {LONGEST:,}")
    return b"".join(parts)


def json_lines(file: File, stage: Dataset) -> Iterator[Record]:
    """A JSON value a line; blank lines are no records."""
    with open_stream(file) as stream:
        for number, line in lines(stream):
            if isinstance(line, InvalidRow):
                yield Record(number, line)
            elif line and not line.isspace():
                yield Record(number, parse(line), line)


def not_utf8(raw: bytes, error: UnicodeDecodeError) -> InvalidRow:
    hint = (
        "; it looks like UTF-16: save the file as UTF-8"
        if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        else ""
    )
    return InvalidRow(f"not UTF-8: byte {raw[error.start]:#04x} at position {error.start}{hint}")


def parse(raw: bytes) -> Any:
    """The JSON value, or a InvalidRow that says why there is none."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=from_pairs)
    except UnicodeDecodeError as error:
        return not_utf8(raw, error)
    except json.JSONDecodeError as error:
        return InvalidRow(f"not JSON: {error.msg} at column {error.colno}")
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        return InvalidRow("not JSON that can be read: a number is too long")
    except RecursionError:
        return InvalidRow("not JSON that can be read: nested too deep")
