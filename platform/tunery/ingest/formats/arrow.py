"""Read Parquet and Arrow files (also Feather 2, and files of saved Hugging Face datasets), one batch at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from tunery.ingest.filesystem import CorruptFile, File, UnavailableFile, open_seekable
from tunery.ingest.formats.record import EXCERPT, InvalidRow, Record, UnsupportedValue, from_pairs, table_row
from tunery.spec import Dataset

BATCH = 1024
Batches = Iterator[tuple[int, Any]]
"""(number of the first row, a RecordBatch, or an InvalidRow with the reason why the rows from there can't be read)."""


def parquet_rows(file: File, stage: Dataset) -> Iterator[Record]:
    """Yield the rows as records, numbered from 1. The remaining rows of a corrupt row group are skipped with one
    InvalidRow, and reading continues with the next row group."""
    yield from _records(parquet_batches(file))


def arrow_rows(file: File, stage: Dataset) -> Iterator[Record]:
    """Yield the rows as records, numbered from 1. Reads the file format and the stream format (which Hugging Face's
    `save_to_disk` writes)."""
    yield from _records(arrow_batches(file))


def _records(batches: Batches) -> Iterator[Record]:
    for number, batch in batches:
        if isinstance(batch, InvalidRow):
            yield Record(number, batch)
        else:
            yield from (Record(index, value) for index, value in enumerate(_values(batch), number))


def parquet_batches(file: File) -> Batches:
    """Yield the batches of a Parquet file. Raises CorruptFile if the file is not a Parquet file."""
    import pyarrow.parquet as pq

    with open_seekable(file) as raw:
        try:
            opened = pq.ParquetFile(raw)
        except UnavailableFile:
            raise
        except Exception as error:
            raise CorruptFile(f"not a readable Parquet file: {_first_line(error)}") from error
        number = 1
        for group in range(opened.num_row_groups):
            end = number + opened.metadata.row_group(group).num_rows
            try:
                for batch in opened.iter_batches(batch_size=BATCH, row_groups=[group]):
                    _check_names(batch)
                    yield number, batch
                    number += batch.num_rows
            except UnavailableFile:
                raise
            except Exception as error:
                yield number, InvalidRow(f"rows {number} to {end - 1} can't be read: {_first_line(error)}")
                number = end


def arrow_batches(file: File) -> Batches:
    """Yield the batches of an Arrow file. Raises CorruptFile if the rest of the file can't be read."""
    with open_seekable(file) as raw:
        number = 1
        try:
            for batch in _batches(raw):
                _check_names(batch)
                for start in range(0, batch.num_rows, BATCH):
                    for piece in _validated(batch.slice(start, BATCH)):
                        yield number, piece
                        number += 1 if isinstance(piece, InvalidRow) else piece.num_rows
        except UnavailableFile:
            raise
        except Exception as error:
            raise CorruptFile(f"not a readable Arrow file: {_first_line(error)}") from error


def _check_names(batch: Any) -> None:
    """Raise UnicodeDecodeError if a column name is corrupt."""
    _ = batch.schema.names


def _batches(raw: Any) -> Iterator[Any]:
    import pyarrow as pa

    head = raw.read(6)
    raw.seek(0)
    if head == b"ARROW1":
        opened = pa.ipc.open_file(raw)
        for index in range(opened.num_record_batches):
            yield opened.get_batch(index)
    else:
        yield from pa.ipc.open_stream(raw)


def _validated(batch: Any) -> Iterator[Any]:
    """Yield slices of a batch with valid values, and an InvalidRow for each corrupt row. Files are not validated when
    they are read, and accessing values with corrupt offsets crashes the process."""
    import pyarrow as pa

    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        if batch.num_rows == 1:
            yield InvalidRow(f"invalid Arrow data: {_first_line(error)}")
        else:
            for index in range(batch.num_rows):
                yield from _validated(batch.slice(index, 1))
    else:
        yield batch


def _values(batch: Any) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch. Values that Python can't represent (text that is not UTF-8, a date in the year
    300,000) are UnsupportedValue."""
    import pyarrow as pa

    names = batch.schema.names
    try:
        columns = [column.to_pylist(maps_as_pydicts="strict") for column in batch.columns]
    except (ValueError, KeyError, OverflowError, pa.ArrowException):
        columns = [[_value(column, index) for index in range(batch.num_rows)] for column in batch.columns]
    for cells in zip(*columns, strict=True):
        yield table_row(from_pairs(list(zip(names, cells, strict=True))))


def _value(column: Any, index: int) -> Any:
    import pyarrow as pa

    try:
        return column[index].as_py(maps_as_pydicts="strict")
    except (ValueError, KeyError, OverflowError, pa.ArrowException) as error:
        return UnsupportedValue(f"can't be read: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:EXCERPT]
