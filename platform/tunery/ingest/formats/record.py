"""Records, as yielded by the readers of all formats, and conversion of their values."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

EXCERPT = 200
"""Number of characters kept of a quarantined record."""
MAX_RECORD_BYTES = 1 << 27
"""128 MiB. A longer record is quarantined without parsing it, to bound memory."""


class InvalidRow(ValueError):
    """The record is not a valid row; the message is the reason in the quarantine."""


@dataclass(frozen=True)
class UnsupportedValue:
    """Replaces a value that can't be read. The row is invalid only if it needs the value."""

    reason: str
    """Continues a message after the name of the value: "occurs twice with different values"."""


@dataclass(frozen=True, slots=True)
class Record:
    line: int
    """1-based: the line of a text file, the row of a sheet, or the number of the value (.json) or row (.parquet,
    .arrow)."""
    value: Any
    """A mapping of columns to values, or an InvalidRow with the reason why the record can't be read."""
    raw: bytes | str | None = None
    """The text of the record or its beginning; None for a binary format."""
    part: str = ""
    """Sheet of a workbook."""

    @property
    def excerpt(self) -> str:
        if self.raw is None:
            text = json.dumps(self.value, ensure_ascii=False, default=str) if isinstance(self.value, dict) else ""
        elif isinstance(self.raw, bytes):
            text = self.raw[: 4 * EXCERPT].decode("utf-8", "replace").rstrip("\r\n")
        else:
            text = self.raw
        return text[:EXCERPT]


def from_pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """Return a dict of the pairs; a key with several different values is an UnsupportedValue, because it is
    ambiguous."""
    result = dict(pairs)
    if len(result) < len(pairs):
        first_values: dict[str, Any] = {}
        for key, value in pairs:
            if key in first_values and first_values[key] != value:
                result[key] = UnsupportedValue("occurs twice with different values")
            first_values.setdefault(key, value)
    return result


def cell_text(value: Any) -> Any:
    """Return a table cell as text, because a column of responses may contain numbers, dates and booleans.

    Numbers are formatted by Python, dates and times as ISO 8601 (midnight as a date only), NaN (a missing value in
    pandas) is None, and values that are not scalars are returned unchanged.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, datetime) and value.time() == time(0) and value.tzinfo is None:
        return value.date().isoformat()
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, int | float | Decimal | timedelta):
        return str(value)
    return value


def table_row(cells: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a row of an Arrow table, whose values may be nested.

    All structs in an Arrow list have the same fields, and null for missing ones (such as two tools with different
    parameters). Null fields are removed, which also removes explicit nulls. JSON text keeps its nulls.
    """
    return {name: cell_text(_without_null_fields(value)) for name, value in cells.items()}


def _without_null_fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null_fields(part) for key, part in value.items() if part is not None}
    return [_without_null_fields(part) for part in value] if isinstance(value, list) else value
