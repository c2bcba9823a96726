"""Plain text: one row per line, per paragraph (separated by blank lines) or per file, as set by `sample_by`."""

from __future__ import annotations

from collections.abc import Iterator

from tunery.ingest.filesystem import File, open_stream
from tunery.ingest.formats.lines import lines, not_utf8
from tunery.ingest.formats.record import MAX_RECORD_BYTES, InvalidRow, Record
from tunery.spec import Dataset


def plain_text(file: File, stage: Dataset) -> Iterator[Record]:
    """Yield records with the column `text`, numbered by their first line. Line ends become `\\n`; blank lines are not
    rows."""
    with open_stream(file) as stream:
        for number, sample in _samples(lines(stream), stage.sample_by or "line"):
            if isinstance(sample, InvalidRow):
                yield Record(number, sample)
            else:
                yield Record(number, _parse(sample), sample)


def _samples(source: Iterator[tuple[int, bytes | InvalidRow]], by: str) -> Iterator[tuple[int, bytes | InvalidRow]]:
    pending: list[bytes] = []
    first, size = 1, 0
    for number, line in source:
        if isinstance(line, InvalidRow):
            yield number, line
            continue
        line = line.removesuffix(b"\r")
        blank = not line or line.isspace()
        if by == "line":
            if not blank:
                yield number, line
        elif blank and (by == "paragraph" or not pending):
            if pending:
                yield first, _join(pending, size)
            pending, size = [], 0
        else:
            if not pending:
                first = number
            size += len(line) + 1
            if size <= MAX_RECORD_BYTES or not pending:
                pending.append(line)
    if pending:
        yield first, _join(pending, size)


def _join(pending: list[bytes], size: int) -> bytes | InvalidRow:
    if size > MAX_RECORD_BYTES:
        return InvalidRow(
            f"a sample of {size:,} bytes, more than the maximum of {MAX_RECORD_BYTES:,}; use `sample_by: line`"
        )
    return b"\n".join(pending).rstrip()


def _parse(sample: bytes) -> dict[str, str] | InvalidRow:
    if b"\0" in sample:
        return InvalidRow(f"a NUL byte at position {sample.index(0)}: the file is not text")
    try:
        return {"text": sample.decode("utf-8")}
    except UnicodeDecodeError as error:
        return not_utf8(sample, error)
