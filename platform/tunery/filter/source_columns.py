"""Which columns the records of a source have, and of which types: found by reading them once.

JSON needs none of it to be written again; a CSV, a workbook and a Parquet file say in front what their rows have.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa

from tunery.filter.originals import Original, SourceTable, unique_names
from tunery.ingest.formats.record import cell_text

BATCH = 1024


@dataclass
class SourceColumns:
    tables: list[SourceTable] = field(default_factory=list)
    """In the order of the sources."""
    types: dict[str, Any] = field(default_factory=dict)
    """Column: pyarrow type, in the order in which columns appear; the null type where nothing was looked at, or all is
    null."""
    has_unreadable: bool = False
    """Some record is text without columns."""

    @property
    def names(self) -> set[str]:
        return set(self.types)

    def only_kind(self) -> str:
        """The kind of all tables; "" where they differ."""
        kinds = {table.kind for table in self.tables}
        return kinds.pop() if len(kinds) == 1 else ""


def find_columns(records: Iterator[Original], *, with_types: bool) -> SourceColumns:
    """Reads all records. `with_types` looks at the values, too: who writes Parquet needs that."""
    found = SourceColumns()
    known: set[int] = set()
    named: set[int] = set()
    pending: dict[str, list[Any]] = {}
    count = 0
    for record in records:
        table = record.table
        if id(table) not in known:
            known.add(id(table))
            found.tables.append(table)
        if not record.is_readable:
            found.has_unreadable = True
            continue
        if table.kind == "csv":
            # All of its columns are in the header, and all are texts.
            if id(table) not in named:
                named.add(id(table))
                for name in table.names:
                    found.types[name] = merged_type(found.types.get(name, pa.null()), pa.string())
            continue
        if table.kind == "arrow":
            if record.index == 0:
                _add_schema(found, record.batch.schema)
            continue
        for name, value in record.values().items():
            if with_types:
                pending.setdefault(name, []).append(value)
            found.types.setdefault(name, pa.null())
        count += 1
        if with_types and count % BATCH == 0:
            _add_values(found, pending)
            pending = {}
    _add_values(found, pending)
    for table in found.tables:
        # Columns of which no record has a cell, and those of a table without records.
        for name in table.names[: len(table.header)]:
            found.types.setdefault(name, pa.null())
    return found


def _add_schema(found: SourceColumns, schema: Any) -> None:
    for name, kind in zip(unique_names(schema.names), schema.types, strict=True):
        found.types[name] = merged_type(found.types.get(name, pa.null()), kind)


def _add_values(found: SourceColumns, pending: dict[str, list[Any]]) -> None:
    for name, values in pending.items():
        found.types[name] = merged_type(found.types[name], _type_of(values))


def _type_of(values: list[Any]) -> Any:
    """The Arrow type that holds all values; text where there is none but text."""
    try:
        kind = pa.array(values).type
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return pa.string()
    return pa.string() if _is_unwritable(kind) else kind


def _is_unwritable(kind: Any) -> bool:
    """Parquet has no struct without fields, which is what `{}` is."""
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(_is_unwritable(kind.field(index).type) for index in range(kind.num_fields))
    if pa.types.is_list(kind):
        return _is_unwritable(kind.value_type)
    return False


def merged_type(left: Any, right: Any) -> Any:
    """The type that holds the values of both without loss; text where there is none but text."""
    if left == right or pa.types.is_null(right):
        return left
    if pa.types.is_null(left):
        return right
    try:
        schemas = [pa.schema([("x", left)]), pa.schema([("x", right)])]
        return pa.unify_schemas(schemas, promote_options="permissive").field("x").type
    except (pa.ArrowException, TypeError):
        return pa.string()


def json_ready(value: Any) -> Any:
    """What JSON has a form for: dates in ISO 8601, bytes in base64, no NaN."""
    if isinstance(value, dict):
        return {str(key): json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, datetime | date | time):
        return cell_text(value)
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value) if isinstance(value, Decimal | timedelta) else repr(value)


def as_text(value: Any) -> str | None:
    """A value as a cell of text: lists and objects as JSON; None where there is none."""
    value = json_ready(value)
    if value is None:
        return None
    if isinstance(value, str):
        # Half of a surrogate pair has no bytes in UTF-8.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return json.dumps(value, ensure_ascii=False)
