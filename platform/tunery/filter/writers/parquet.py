"""Write Parquet files. A row from a Parquet or Arrow file keeps its Arrow values and the source's schema."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tunery.filter.originals import Original, unique_names
from tunery.filter.source_columns import SourceColumns, as_text
from tunery.filter.writers.writer import AddedValues, WriteCounts, Writer

ROW_GROUP = 16_384
ROW_GROUP_BYTES = 32 << 20


@contextmanager
def parquet(path: Path, columns: SourceColumns, added: AddedValues, counts: WriteCounts) -> Iterator[Writer]:
    schema = _schema(columns, added)
    with pq.ParquetWriter(path, schema) as file:
        tables = _Tables(file, schema, set(added))
        yield tables
        tables.flush()


def _schema(columns: SourceColumns, added: AddedValues) -> Any:
    """Return the sources' schema with its metadata, if all have the same; otherwise one with the columns of all
    sources."""
    added_fields = [pa.field(name, kind) for name, kind in added.items()]
    source_schemas = [table.schema for table in columns.tables]
    if not source_schemas or any(
        schema is None or not schema.equals(source_schemas[0], check_metadata=True) for schema in source_schemas
    ):
        return pa.schema([*(pa.field(name, kind) for name, kind in columns.types.items()), *added_fields])
    if list(columns.types) != source_schemas[0].names:  # duplicate names
        return pa.schema([*(pa.field(name, kind) for name, kind in columns.types.items()), *added_fields])
    if not added_fields:
        return source_schemas[0]
    metadata: dict[bytes | str, bytes | str] = dict(source_schemas[0].metadata or {})
    # Hugging Face's metadata lists all columns, so it would be wrong with added ones. Unreadable records are nulls.
    metadata.pop(b"huggingface", None)
    return pa.schema([*(item.with_nullable(True) for item in source_schemas[0]), *added_fields], metadata)


class _Tables:
    """Collects rows in row groups. Adjacent rows of one Arrow batch are taken from it together."""

    def __init__(self, file: Any, schema: Any, added_names: set[str]) -> None:
        self._file, self._schema, self._added_names = file, schema, added_names
        self._batch: Any = None
        self._indices: list[int] = []
        self._values: list[dict[str, Any]] = []
        self._added: list[AddedValues] = []
        self._ready: list[Any] = []
        self._rows = self._bytes = 0

    def write(self, record: Original, added: AddedValues) -> None:
        batch = record.batch if record.is_readable else None
        if self._added and (batch is not self._batch or len(self._added) == 1024):
            self._end_run()
        self._batch = batch
        if batch is None:
            self._values.append(record.values())
        else:
            self._indices.append(record.index)
        self._added.append(added)

    def flush(self) -> None:
        if self._added:
            self._end_run()
        if self._ready:
            self._file.write_table(pa.concat_tables(self._ready))
        self._ready, self._rows, self._bytes = [], 0, 0

    def _end_run(self) -> None:
        source_columns: dict[str, Any] = {}
        if self._batch is not None:
            rows = self._batch.take(pa.array(self._indices))
            source_columns = dict(zip(unique_names(self._batch.schema.names), rows.columns, strict=True))
        arrays = []
        for item in self._schema:
            if item.name in self._added_names:
                arrays.append(pa.array([added.get(item.name) for added in self._added], item.type))
            elif self._batch is None:
                arrays.append(_array([values.get(item.name) for values in self._values], item.type))
            elif item.name in source_columns:
                arrays.append(_cast(source_columns[item.name], item.type))
            else:
                arrays.append(pa.nulls(len(self._added), item.type))
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._ready.append(table)
        self._rows, self._bytes = self._rows + table.num_rows, self._bytes + table.nbytes
        self._indices, self._values, self._added, self._batch = [], [], [], None
        if self._rows >= ROW_GROUP or self._bytes >= ROW_GROUP_BYTES:
            self.flush()


def _array(values: list[Any], kind: Any) -> Any:
    return pa.array([as_text(value) for value in values] if pa.types.is_string(kind) else values, kind)


def _cast(column: Any, kind: Any) -> Any:
    if column.type == kind:
        return column
    try:
        return column.cast(kind)
    except (pa.ArrowException, NotImplementedError):
        return _array(column.to_pylist(), kind)
