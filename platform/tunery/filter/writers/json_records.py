"""Write JSON Lines, or a JSON array of records. A record that is JSON in its source keeps its text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tunery.filter.originals import Original, one_line
from tunery.filter.source_columns import SourceColumns, json_ready
from tunery.filter.writers.writer import AddedValues, WriteCounts, Writer


@contextmanager
def json_lines(path: Path, columns: SourceColumns, added: AddedValues, counts: WriteCounts) -> Iterator[Writer]:
    class Lines:
        def write(self, record: Original, added: AddedValues) -> None:
            file.write(one_line(_json_text(record, added)) + "\n")

    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        yield Lines()


@contextmanager
def json_array(path: Path, columns: SourceColumns, added: AddedValues, counts: WriteCounts) -> Iterator[Writer]:
    class Elements:
        def write(self, record: Original, added: AddedValues) -> None:
            text = _json_text(record, added).strip()
            # The first line of a multi-line value gets the indentation of its last line.
            last = text.rpartition("\n")[2] if "\n" in text else ""
            indent = last[: len(last) - len(last.lstrip())]
            file.write((",\n" if counts.rows else "\n") + indent + text)

    with path.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        file.write("[")
        yield Elements()
        file.write("\n]\n")


def _json_text(record: Original, added: AddedValues) -> str:
    added_values = {name: json_ready(value) for name, value in added.items()}
    if record.table.kind != "json" or not record.is_readable:
        return json.dumps(json_ready(record.values()) | added_values, ensure_ascii=False)
    if not added_values:
        return record.text
    # Insert into the record's text, so that its numbers, escapes and order of keys are unchanged.
    before = record.text.rstrip().removesuffix("}").rstrip()
    return before + ("" if before.endswith("{") else ", ") + json.dumps(added_values, ensure_ascii=False)[1:]
