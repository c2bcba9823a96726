"""Reading rows from whatever a dataset stage names, in one schema. One bad record costs that record.

Works as a stream: a record, or a batch of them, is in memory at a time.
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
from tunery.ingest.formats.hub import Ambiguous, HubDataset, hub_rows
from tunery.ingest.formats.record import EXCERPT, InvalidRow, Record
from tunery.ingest.messages import MediaRow, MessageReader
from tunery.ingest.sources import (
    BUILTIN,
    BadSource,
    Builtin,
    ambiguous,
    check_fields,
    find_parts,
    out_of_reach,
    sources_of,
)
from tunery.ingest.split import split_of
from tunery.spec import Dataset
from tunery.store.rows import Row, RowFormat, row_format, row_id, tables_of

PROBED = 1000
"""Records of a file that are looked at before a run: enough to get past a head of bad ones, read in no time."""
_SHAPES_KEPT = 1000
IGNORED_NAMES = 100
"""Different columns and keys that are counted by name; all further ones are counted as one."""


@dataclass(frozen=True)
class Quarantined:
    """A record that can't be used."""

    source: str
    line: int
    reason: str
    excerpt: str


Quarantine = Callable[[Quarantined], None]


@dataclass
class ReadCounts:
    """What became of the records that were read: each is a row, in quarantine, or of another split."""

    records: int = 0
    quarantined: int = 0
    other_splits: int = 0
    shapes: Counter[RowFormat] = field(default_factory=Counter)
    """Of the rows."""
    planted: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    """Columns, and keys of turns ("messages[].lang"), that no row keeps: the number of rows in which they hold
    something."""

    def ignore(self, names: Mapping[str, int]) -> None:
        for name, rows in names.items():
            known = name in self.ignored or len(self.ignored) < IGNORED_NAMES
            self.ignored[name if known else "other columns"] += rows

    def add(self, other: ReadCounts) -> None:
        self.records += other.records
        self.quarantined += other.quarantined
        self.other_splits += other.other_splits
        self.shapes += other.shapes
        self.planted += other.planted
        self.ignore(other.ignored)


def check_source(stage: Dataset, folder: Path) -> None:
    """Raises BadSource when the source is missing, empty, of an unknown form, its columns fit no shape, or none of its
    first records makes a row."""
    wrong = ""
    parts = find_parts(stage, folder)
    check_fields(stage, parts)
    for part in parts:
        if isinstance(part, Builtin):
            return
        unusable = _why_unusable(part, stage)
        if unusable is None:
            return
        wrong = wrong or unusable
    array = "; for a JSON array in a .jsonl file say `format: json`" if ".jsonl" in wrong and "JSON" in wrong else ""
    raise BadSource(
        "source",
        f"`{source_label(stage)}` holds no row",
        cause=f"none of its records makes a row (up to {PROBED:,} are tried); the first: {wrong}"
        if wrong
        else "every file is empty",
        remedy=f"give a file with at least one row that can be used{array}",
    )


def source_label(stage: Dataset) -> str:
    """The sources in a few words: the first ones by name."""
    sources = [
        f"{source}/{stage.subset}" if source == BUILTIN and stage.subset else source for source in sources_of(stage)
    ]
    return ", ".join(sources[:3]) + (f" and {len(sources) - 3} more" if len(sources) > 3 else "")


def read_source(stage: Dataset, folder: Path, quarantine: Quarantine, tally: ReadCounts | None = None) -> Iterator[Row]:
    """Rows of the stage's split and limit, with group, source and line; not yet damaged, without ids.

    Raises BadSource when the source can't be found, UnavailableFile when a file or the network fails under way.
    """
    yield from itertools.islice(_rows(stage, folder, quarantine, tally or ReadCounts()), stage.limit)


def as_tables(rows: Iterable[Row], tally: ReadCounts) -> Iterator[pa.Table]:
    """Rows with their ids, in tables of the schema; counted by shape and by planted damage."""

    def finished() -> Iterator[Row]:
        for row in rows:
            tally.shapes[row_format(row)] += 1
            if row.get("planted") is not None:
                tally.planted[row["planted"]] += 1
            yield {**row, "id": row_id(row)}

    return tables_of(finished())


def _rows(stage: Dataset, folder: Path, quarantine: Quarantine, tally: ReadCounts) -> Iterator[Row]:
    for part in find_parts(stage, folder):
        if isinstance(part, Builtin):
            yield from _builtin(part, stage, tally)
        else:
            yield from read_part(part, stage, quarantine, tally)


def _wanted(stage: Dataset) -> Callable[[str], bool]:
    return lambda group: stage.split == "all" or split_of(group, stage.eval_fraction) == stage.split


def _builtin(part: Builtin, stage: Dataset, tally: ReadCounts) -> Iterator[Row]:
    assert stage.subset is not None, "check_source saw to it"
    for number, row in enumerate(python_docs.rows(stage.subset, _wanted(stage)), 1):
        tally.records += 1
        yield {**row, "source": part.name, "line": number}


def read_part(part: File | HubDataset, stage: Dataset, quarantine: Quarantine, tally: ReadCounts) -> Iterator[Row]:
    """Its rows of the stage's split. Raises UnavailableFile."""
    wanted = _wanted(stage)
    convert = _Conversion(stage)
    for record in records_of(part, stage):
        tally.records += 1
        name = f"{part.name}#{record.part}" if record.part else part.name
        try:
            row = convert(record.value)
        except (InvalidRow, UnknownColumns) as error:
            tally.quarantined += 1
            quarantine(Quarantined(name, record.line, str(error), record.excerpt))
            continue
        if convert.ignored:
            tally.ignore(dict.fromkeys(sorted(convert.ignored), 1))
        group = row["text"] if row.get("text") else _first_question(row)
        if wanted(group):
            yield {**row, "group": group, "source": name, "line": record.line}
        else:
            tally.other_splits += 1


def records_of(part: File | HubDataset, stage: Dataset) -> Iterator[Record]:
    """The part's records; where it can't be read further, the last one says so."""
    if isinstance(part, HubDataset):
        yield from hub_rows(part)
        return
    line, format_ = 0, format_of(part, stage)
    assert format_ is not None, "find_parts saw to it"
    try:
        for record in READERS[format_](part, stage):
            line = record.line
            yield record
    except CorruptFile as error:
        yield Record(line + 1, InvalidRow(f"{'from here on' if line else 'the whole file'}: {error}"))


class _Conversion:
    """From records to rows, by the columns of each. `ignored`: what the last record holds and its row does not."""

    def __init__(self, stage: Dataset) -> None:
        self._columns = stage.columns
        self._reader = MessageReader(stage.roles, stage.message_keys)
        self._converters: dict[Any, Converter] = {}
        self.ignored = self._reader.ignored

    def __call__(self, value: Any) -> Row:
        """Raises UnknownColumns, InvalidRow."""
        if not isinstance(value, Mapping):
            raise _no_row(value)
        key = tuple(value), tuple(field is None for field in value.values())
        if key not in self._converters:
            if len(self._converters) == _SHAPES_KEPT:
                self._converters.clear()
            self._converters[key] = converter(value, self._columns, self._reader)
        try:
            return self._converters[key](value)
        except RecursionError:
            raise InvalidRow("nested too deep") from None


def _no_row(value: Any) -> InvalidRow:
    """What is wrong with a value that has no columns."""
    return (
        value
        if isinstance(value, InvalidRow)
        else InvalidRow(f"a row must be an object, this is {type(value).__name__}")
    )


def _first_question(row: Row) -> str:
    turns = row["messages"]
    return str(next((turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"]))


def _why_unusable(part: File | HubDataset, stage: Dataset) -> str | None:
    """Why the first record makes no row, where none of the first `PROBED` does; "" where there is no record. Raises
    BadSource when the columns of none of them fit, or all that fit hold images, videos or audio."""
    convert = _Conversion(stage)
    misfit: UnknownColumns | None = None
    media: MediaRow | None = None
    wrong = ""
    fits = False
    try:
        for record in itertools.islice(records_of(part, stage), PROBED):
            try:
                convert(record.value)
            except UnknownColumns as error:
                misfit = misfit or error
                continue
            except MediaRow as error:
                media = media or error
                reason = str(error)
            except InvalidRow as error:
                fits = fits or isinstance(record.value, Mapping)
                reason = str(error)
            else:
                return None
            wrong = wrong or f"{part.name}:{record.line}: {reason[:EXCERPT]}"
    except UnavailableFile as error:
        raise out_of_reach(error) from error
    except Ambiguous as error:
        raise ambiguous(error) from error
    if fits:
        return wrong
    if media is not None:
        raise BadSource(
            "source",
            f"`{part.name}` holds multimodal rows",
            cause=str(media),
            remedy="take rows of text; of those whose text has no placeholder, `columns` reads the text alone",
        )
    if misfit is not None:
        raise BadSource(
            "columns" if stage.columns else "source",
            f"the columns of `{part.name}` don't fit",
            cause=str(misfit),
            remedy="name them, such as `columns: {prompt: q, completion: a}` or `columns: {text: body}`",
        )
    return wrong


def first_shape(stage: Dataset, folder: Path) -> RowFormat:
    """The shape of a source's first usable row. Raises BadSource when there is none."""
    if sources_of(stage)[0] == BUILTIN:
        shapes: dict[str, RowFormat] = {
            "texts": "text",
            "preferences": "preference",
            "damaged": "preference",
            "prompts": "prompt",
        }
        return shapes.get(stage.subset or "", "conversation")
    return row_format(first_rows(stage, folder, 1)[0])


def first_rows(stage: Dataset, folder: Path, most: int) -> list[Row]:
    """Of a source of files, whatever their split; at least one. Raises BadSource when there is none."""
    unlimited = stage.model_copy(update={"split": "all", "limit": most})
    check_source(stage, folder)
    try:
        return list(read_source(unlimited, folder, lambda line: None))
    except UnavailableFile as error:
        raise out_of_reach(error) from error
