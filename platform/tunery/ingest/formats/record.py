"""What every format's reader gives: one record after another, readable or not."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

EXCERPT = 200
"""Characters of a quarantined record that are kept."""
LONGEST = 1 << 27
"""Bytes of one record, 128 MiB. What is longer is quarantined unread: one record may not fill the memory."""


class InvalidRow(ValueError):
    """A row that can't be used; the message is the reason, for the quarantine."""


@dataclass(frozen=True)
class UnsupportedValue:
    """In the place of a value that can't be had. It costs the row only where the row needs that value."""

    reason: str
    """Follows the value's name: "stands twice, with different values"."""


@dataclass(frozen=True, slots=True)
class Record:
    line: int
    """1-based: line of a text file, row of a sheet, number of a value in .json, of a row in .parquet and .arrow."""
    value: Any
    """A mapping of columns to values where all is well, or the InvalidRow that says why it can't be read."""
    raw: bytes | str | None = None
    """Its text, or the beginning of it; None where it is none."""
    part: str = ""
    """Sheet of a workbook."""

    @property
    def excerpt(self) -> str:
        if self.raw is None:
            shown = json.dumps(self.value, ensure_ascii=False, default=str) if isinstance(self.value, dict) else ""
        elif isinstance(self.raw, bytes):
            shown = self.raw[: 4 * EXCERPT].decode("utf-8", "replace").rstrip("\r\n")
        else:
            shown = self.raw
        return shown[:EXCERPT]


def from_pairs(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """A dict of keys and values; a key that stands twice with different values is Unusable: which is meant?"""
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen and seen[key] != value:
                found[key] = UnsupportedValue("stands twice, with different values")
            seen.setdefault(key, value)
    return found


def cell_text(value: Any) -> Any:
    """A table's cell as text: a column of answers may hold numbers, dates and truth values (`How many?` 42).

    Whole numbers and decimals as Python writes them, dates and times in ISO 8601 (midnight is a date alone), not a
    number (how pandas writes "missing") as None; what is no scalar stays as it is.
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
    """A row of an Arrow table, whose values may be nested.

    All structs of a list have the same fields, and null for those that one lacks (two tools with different parameters):
    such a field is left out. A null that somebody wrote looks the same. JSON text keeps its nulls.
    """
    return {name: cell_text(_without_null_fields(value)) for name, value in cells.items()}


def _without_null_fields(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_null_fields(part) for key, part in value.items() if part is not None}
    return [_without_null_fields(part) for part in value] if isinstance(value, list) else value
