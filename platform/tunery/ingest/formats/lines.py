"""Lines of a file, and JSON Lines. An invalid line does not affect other lines."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from typing import Any

from tunery.ingest.filesystem import Bytes, File, open_stream
from tunery.ingest.formats.record import EXCERPT, MAX_RECORD_BYTES, InvalidRow, Record, from_pairs
from tunery.spec import Dataset

CHUNK = 1 << 20


def lines(stream: Bytes) -> Iterator[tuple[int, bytes | InvalidRow]]:
    """Yield (1-based number, line without its `\\n`) without a byte order mark; a line longer than MAX_RECORD_BYTES is
    an InvalidRow.

    If the stream raises CorruptFile, all lines before the corrupt part are yielded first.
    """
    number, parts, size = 1, [], 0
    first = True
    while chunk := stream.read(CHUNK):
        if first:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
            first = False
        *line_ends, rest = chunk.split(b"\n")
        for end in line_ends:
            parts.append(end)
            yield number, _join(parts, size + len(end))
            number, parts, size = number + 1, [], 0
        size += len(rest)
        parts = [*parts, rest] if size <= MAX_RECORD_BYTES else [b"".join(parts)[: 4 * EXCERPT]]
    if size:
        yield number, _join(parts, size)


def _join(parts: list[bytes], size: int) -> bytes | InvalidRow:
    if size > MAX_RECORD_BYTES:
        return InvalidRow(f"a line of {size:,} bytes, more than the maximum of {MAX_RECORD_BYTES:,}")
    return b"".join(parts)


def json_lines(file: File, stage: Dataset) -> Iterator[Record]:
    """Yield a record per line with a JSON value; blank lines are skipped."""
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
    """Return the JSON value, or an InvalidRow with the parse error."""
    try:
        return json.loads(raw.decode("utf-8"), object_pairs_hook=from_pairs)
    except UnicodeDecodeError as error:
        return not_utf8(raw, error)
    except json.JSONDecodeError as error:
        return InvalidRow(f"not JSON: {error.msg} at column {error.colno}")
    except ValueError:  # Python rejects integers with more than 4,300 digits
        return InvalidRow("JSON with a number that is too long")
    except RecursionError:
        return InvalidRow("JSON that is nested too deep")
