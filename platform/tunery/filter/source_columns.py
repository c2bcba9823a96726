"""Find the columns of a source's records, and their types, by reading all records once.

CSV files, workbooks and Parquet files declare their columns before the first row.
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
    """pyarrow type by column, in the order in which columns appear; the null type if no value was inspected, or all
    values are null."""
    has_unreadable: bool = False
    """Whether any record is unreadable, so that it has no columns."""

    @property
    def names(self) -> set[str]:
        return set(self.types)

    def only_kind(self) -> str:
        """Return the kind of all tables; "" if they differ."""
        kinds = {table.kind for table in self.tables}
        return kinds.pop() if len(kinds) == 1 else ""


def find_columns(records: Iterator[Original], *, with_types: bool) -> SourceColumns:
    """Read all records and return their columns. `with_types`: infer types from the values of JSON records and
    workbooks, as the Parquet writer requires."""
    columns = SourceColumns()
    known_tables: set[int] = set()
    tables_with_names: set[int] = set()
    pending: dict[str, list[Any]] = {}
    count = 0
    for record in records:
        table = record.table
        if id(table) not in known_tables:
            known_tables.add(id(table))
            columns.tables.append(table)
        if not record.is_readable:
            columns.has_unreadable = True
            continue
        if table.kind == "csv":
            # The header has all columns, and all values are strings.
            if id(table) not in tables_with_names:
                tables_with_names.add(id(table))
                for name in table.names:
                    columns.types[name] = merged_type(columns.types.get(name, pa.null()), pa.string())
            continue
        if table.kind == "arrow":
            if record.index == 0:
                _add_schema(columns, record.batch.schema)
            continue
        for name, value in record.values().items():
            if with_types:
                pending.setdefault(name, []).append(value)
            columns.types.setdefault(name, pa.null())
        count += 1
        if with_types and count % BATCH == 0:
            _add_values(columns, pending)
            pending = {}
    _add_values(columns, pending)
    for table in columns.tables:
        # Columns without a cell in any record, and columns of a table without records.
        for name in table.names[: len(table.header)]:
            columns.types.setdefault(name, pa.null())
    return columns


def _add_schema(columns: SourceColumns, schema: Any) -> None:
    for name, kind in zip(unique_names(schema.names), schema.types, strict=True):
        columns.types[name] = merged_type(columns.types.get(name, pa.null()), kind)


def _add_values(columns: SourceColumns, pending: dict[str, list[Any]]) -> None:
    for name, values in pending.items():
        columns.types[name] = merged_type(columns.types[name], _type_of(values))


def _type_of(values: list[Any]) -> Any:
    """Return the Arrow type for all values; string if there is no other."""
    try:
        kind = pa.array(values).type
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        return pa.string()
    return pa.string() if _has_empty_struct(kind) else kind


def _has_empty_struct(kind: Any) -> bool:
    """Whether a type contains a struct without fields (`{}`), which Parquet does not support."""
    if pa.types.is_struct(kind):
        return kind.num_fields == 0 or any(
            _has_empty_struct(kind.field(index).type) for index in range(kind.num_fields)
        )
    if pa.types.is_list(kind):
        return _has_empty_struct(kind.value_type)
    return False


def merged_type(left: Any, right: Any) -> Any:
    """Return the common type by pyarrow's permissive promotion; string if there is none."""
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
    """Convert a value to one that JSON supports: dates in ISO 8601, bytes in base64, NaN and infinity as None."""
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
    """Format a value as a text cell: lists and objects as JSON; None for a missing value."""
    value = json_ready(value)
    if value is None:
        return None
    if isinstance(value, str):
        # UTF-8 can't encode a lone surrogate.
        return value.encode("utf-8", "backslashreplace").decode("utf-8")
    return json.dumps(value, ensure_ascii=False)
