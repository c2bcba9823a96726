"""Reads the rows of a dataset stage's sources into one schema. An invalid record is quarantined, and reading continues.

Reading is streamed: only one record, or one batch of records, is in memory at a time.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from tunery.ingest import python_docs
from tunery.ingest.columns import Converter, UnknownColumns, converter
from tunery.ingest.filesystem import CorruptFile, File, UnavailableFile
from tunery.ingest.formats import READERS, format_of
from tunery.ingest.formats.hub import AmbiguousDataset, HubDataset, hub_rows
from tunery.ingest.formats.record import EXCERPT, InvalidRow, Record
from tunery.ingest.messages import MediaRow, MessageReader
from tunery.ingest.sources import (
    BUILTIN,
    BadSource,
    Builtin,
    ambiguous_dataset,
    resolve_sources,
    sources_of,
    unavailable_source,
    validate_source_fields,
)
from tunery.ingest.split import split_of
from tunery.spec import Dataset
from tunery.store.rows import Row, RowFormat, row_format, row_id, tables_of

MAX_PROBED_RECORDS = 1000
"""Maximum number of records of a file that are read to validate it before a run."""
_MAX_CONVERTERS = 1000
MAX_IGNORED_NAMES = 100
"""Maximum number of distinct ignored columns and keys counted by name; all others are counted together."""


@dataclass(frozen=True)
class Quarantined:
    """A record that can't be converted to a row."""

    source: str
    line: int
    reason: str
    excerpt: str


Quarantine = Callable[[Quarantined], None]


@dataclass
class ReadCounts:
    """Counts of the records read: each is a row, quarantined, or of another split."""

    records: int = 0
    quarantined: int = 0
    other_splits: int = 0
    row_formats: Counter[RowFormat] = field(default_factory=Counter)
    """Number of rows by row format."""
    corruption_kinds: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    """Columns, and keys of messages ("messages[].lang"), that are not part of a row, with the number of rows in which
    they have a value."""

    def ignore(self, names: Mapping[str, int]) -> None:
        for name, rows in names.items():
            by_name = name in self.ignored or len(self.ignored) < MAX_IGNORED_NAMES
            self.ignored[name if by_name else "other columns"] += rows

    def add(self, other: ReadCounts) -> None:
        self.records += other.records
        self.quarantined += other.quarantined
        self.other_splits += other.other_splits
        self.row_formats += other.row_formats
        self.corruption_kinds += other.corruption_kinds
        self.ignore(other.ignored)


def validate_source(stage: Dataset, folder: Path) -> None:
    """Validate the source. Raises BadSource if it is missing, empty or of an unknown format, if its columns fit no row
    format, or if none of its first records is a valid row."""
    first_error = ""
    parts = resolve_sources(stage, folder)
    validate_source_fields(stage, parts)
    for part in parts:
        if isinstance(part, Builtin):
            return
        error = _find_error(part, stage)
        if error is None:
            return
        first_error = first_error or error
    is_json_array = ".jsonl" in first_error and "JSON" in first_error
    hint = "; for a JSON array in a .jsonl file set `format: json`" if is_json_array else ""
    raise BadSource(
        "source",
        f"`{source_label(stage)}` has no valid row",
        cause=f"none of its first {MAX_PROBED_RECORDS:,} records is a valid row; the first: {first_error}"
        if first_error
        else "every file is empty",
        remedy=f"provide a file with at least one valid row{hint}",
    )


def source_label(stage: Dataset) -> str:
    """Return a short description of the sources: the names of the first three."""
    sources = [
        f"{source}/{stage.subset}" if source == BUILTIN and stage.subset else source for source in sources_of(stage)
    ]
    return ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")


def read_source(
    stage: Dataset, folder: Path, quarantine: Quarantine, counts: ReadCounts | None = None
) -> Iterator[Row]:
    """Yield the rows of the stage's split up to its limit, with group, source and line, without ids and before
    corruption is injected.

    Raises BadSource if the source can't be found, UnavailableFile if a file or the network fails while reading.
    """
    yield from itertools.islice(_read_parts(stage, folder, quarantine, counts or ReadCounts()), stage.limit)


def as_tables(rows: Iterable[Row], counts: ReadCounts) -> Iterator[pa.Table]:
    """Add ids and yield the rows as tables of the schema, counting them by row format and by injected corruption."""

    def rows_with_ids() -> Iterator[Row]:
        for row in rows:
            counts.row_formats[row_format(row)] += 1
            if row.get("injected_corruption") is not None:
                counts.corruption_kinds[row["injected_corruption"]] += 1
            yield {**row, "id": row_id(row)}

    return tables_of(rows_with_ids())


def _read_parts(stage: Dataset, folder: Path, quarantine: Quarantine, counts: ReadCounts) -> Iterator[Row]:
    for part in resolve_sources(stage, folder):
        if isinstance(part, Builtin):
            yield from _read_builtin(part, stage, counts)
        else:
            yield from read_part(part, stage, quarantine, counts)


def _split_filter(stage: Dataset) -> Callable[[str], bool]:
    return lambda group: stage.split == "all" or split_of(group, stage.eval_fraction) == stage.split


def _read_builtin(part: Builtin, stage: Dataset, counts: ReadCounts) -> Iterator[Row]:
    assert stage.subset is not None, "validate_source rejects a builtin source without a subset"
    for number, row in enumerate(python_docs.rows(stage.subset, _split_filter(stage)), 1):
        counts.records += 1
        yield {**row, "source": part.name, "line": number}


def read_part(part: File | HubDataset, stage: Dataset, quarantine: Quarantine, counts: ReadCounts) -> Iterator[Row]:
    """Yield the rows of a part that are in the stage's split. Raises UnavailableFile."""
    is_in_split = _split_filter(stage)
    convert = _RecordConverter(stage)
    for record in records_of(part, stage):
        counts.records += 1
        name = f"{part.name}#{record.part}" if record.part else part.name
        try:
            row = convert(record.value)
        except (InvalidRow, UnknownColumns) as error:
            counts.quarantined += 1
            quarantine(Quarantined(name, record.line, str(error), record.excerpt))
            continue
        if convert.ignored:
            counts.ignore(dict.fromkeys(sorted(convert.ignored), 1))
        group = row["text"] if row.get("text") else _first_user_content(row)
        if is_in_split(group):
            yield {**row, "group": group, "source": name, "line": record.line}
        else:
            counts.other_splits += 1


def records_of(part: File | HubDataset, stage: Dataset) -> Iterator[Record]:
    """Yield the records of a part; if it is corrupt, the last record holds the error."""
    if isinstance(part, HubDataset):
        yield from hub_rows(part)
        return
    line, format_ = 0, format_of(part, stage)
    assert format_ is not None, "resolve_sources returns only files of a known format"
    try:
        for record in READERS[format_](part, stage):
            line = record.line
            yield record
    except CorruptFile as error:
        yield Record(line + 1, InvalidRow(f"{'from this line on' if line else 'the whole file'}: {error}"))


class _RecordConverter:
    """Converts records to rows, with one cached converter per set of columns. `ignored` names the columns and keys of
    the last record that are not part of its row."""

    def __init__(self, stage: Dataset) -> None:
        self._columns = stage.columns
        self._reader = MessageReader(stage.roles, stage.message_keys)
        self._converters: dict[Any, Converter] = {}
        self.ignored = self._reader.ignored

    def __call__(self, value: Any) -> Row:
        """Raises UnknownColumns, InvalidRow."""
        if not isinstance(value, Mapping):
            raise _not_an_object_error(value)
        key = tuple(value), tuple(field is None for field in value.values())
        if key not in self._converters:
            if len(self._converters) == _MAX_CONVERTERS:
                self._converters.clear()
            self._converters[key] = converter(value, self._columns, self._reader)
        try:
            return self._converters[key](value)
        except RecursionError:
            raise InvalidRow("nested too deep") from None


def _not_an_object_error(value: Any) -> InvalidRow:
    return (
        value if isinstance(value, InvalidRow) else InvalidRow(f"a row must be an object, not {type(value).__name__}")
    )


def _first_user_content(row: Row) -> str:
    messages = row["messages"]
    return str(next((message["content"] for message in messages if message["role"] == "user"), messages[0]["content"]))


def _find_error(part: File | HubDataset, stage: Dataset) -> str | None:
    """Return None if one of the first MAX_PROBED_RECORDS records is a valid row, else the error of the first record
    ("" if there is no record).

    Raises BadSource if the columns of all records are unknown, or if all other records have images, video or audio.
    """
    convert = _RecordConverter(stage)
    columns_error: UnknownColumns | None = None
    media_error: MediaRow | None = None
    first_error = ""
    has_known_columns = False
    try:
        for record in itertools.islice(records_of(part, stage), MAX_PROBED_RECORDS):
            try:
                convert(record.value)
            except UnknownColumns as error:
                columns_error = columns_error or error
                continue
            except MediaRow as error:
                media_error = media_error or error
                reason = str(error)
            except InvalidRow as error:
                has_known_columns = has_known_columns or isinstance(record.value, Mapping)
                reason = str(error)
            else:
                return None
            first_error = first_error or f"{part.name}:{record.line}: {reason[:EXCERPT]}"
    except UnavailableFile as error:
        raise unavailable_source(error) from error
    except AmbiguousDataset as error:
        raise ambiguous_dataset(error) from error
    if has_known_columns:
        return first_error
    if media_error is not None:
        raise BadSource(
            "source",
            f"`{part.name}` has multimodal rows",
            cause=str(media_error),
            remedy="use text-only data; if the texts have no media placeholders, set `columns` to read only the text",
        )
    if columns_error is not None:
        raise BadSource(
            "columns" if stage.columns else "source",
            f"the columns of `{part.name}` match no row format",
            cause=str(columns_error),
            remedy="map them, for example `columns: {prompt: q, completion: a}` or `columns: {text: body}`",
        )
    return first_error


def first_row_format(stage: Dataset, folder: Path) -> RowFormat:
    """Return the row format of the first valid row of a source. Raises BadSource if there is none."""
    if sources_of(stage)[0] == BUILTIN:
        formats: dict[str, RowFormat] = {
            "texts": "text",
            "preferences": "preference",
            "corrupted": "preference",
            "prompts": "prompt",
        }
        return formats.get(stage.subset or "", "conversation")
    return row_format(first_rows(stage, folder, 1)[0])


def first_rows(stage: Dataset, folder: Path, max_rows: int) -> list[Row]:
    """Return the first rows of a source of files from all splits, at least one. Raises BadSource if there is none."""
    all_splits = stage.model_copy(update={"split": "all", "limit": max_rows})
    validate_source(stage, folder)
    try:
        return list(read_source(all_splits, folder, lambda line: None))
    except UnavailableFile as error:
        raise unavailable_source(error) from error
