"""Write the output files of a filter: the original records that it kept and, on request, those that it dropped.

The sources are read twice more: to find their columns, and to write the records. Records and decisions are matched by
source and line; every record must have a decision, and every decision a record. Both files are counts under temporary
names and renamed at the end, so each of them is complete or absent. If no row is kept, there is no file of kept rows:
an empty file could be mistaken for a result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from tunery.errors import RequestError, RowCountError, StageError, TuneryError
from tunery.filter.originals import Original, free_name, originals
from tunery.filter.row_decisions import RowDecisions
from tunery.filter.source_columns import SourceColumns, find_columns
from tunery.filter.writers import WRITERS, WriteCounts, Writer
from tunery.ingest.filesystem import UnavailableFile
from tunery.ingest.sources import BadSource, source_identity
from tunery.spec import Dataset
from tunery.store.atomic_write import publish_file, temporary_name


@dataclass(frozen=True)
class Counts:
    """Number of records by decision."""

    kept: int
    dropped: int
    quarantined: int


@dataclass(frozen=True)
class AddedColumns:
    """Names of the columns after a record's own, distinct from all columns of the sources."""

    scores: dict[str, str]
    """Column by score; empty if no scores are requested."""
    dropped_by: str
    dropped_reason: str
    raw_record: str
    """Column for the text of an unreadable record. It is written only if there is such a record."""


@dataclass(frozen=True)
class Outputs:
    kept: WriteCounts
    """All counts are 0 if no row is kept."""
    dropped: WriteCounts | None
    added: AddedColumns


def check_ending(path: Path, option: str) -> None:
    """Raise RequestError if no writer supports the file's extension."""
    if path.suffix not in WRITERS:
        raise RequestError(
            f"`{option} {path}` has an unsupported ending",
            cause=f"it ends in `{path.suffix}`" if path.suffix else "it has no ending",
            remedy=f"use one of: {' '.join(WRITERS)}",
        )


def write_outputs(
    stage: Dataset,
    folder: Path,
    decisions: RowDecisions,
    expected: Counts,
    *,
    out: Path,
    dropped: Path | None,
    scores: Sequence[str],
    identity: Any,
) -> Outputs:
    """Write the kept and, if `dropped` is a path, the dropped and quarantined records.

    `stage` and `folder` are those that read the rows, `scores` the scores to write, `identity` the identity of the
    sources when the run started. Raises RowCountError if records and decisions do not match, StageError if a source has
    changed or can't be read again, RequestError if a file's format can't represent a row, TuneryError if a file can't
    be counts.
    """
    with _source_errors(stage, folder, identity), ExitStack() as stack:
        with_types = ".parquet" in (out.suffix, dropped.suffix if dropped else "")
        columns = find_columns((record for record in originals(stage, folder)), with_types=with_types)
        added = _added(columns, scores)
        score_types = dict.fromkeys(added.scores.values(), pa.float64())
        dropped_types = {**score_types, added.dropped_by: pa.string(), added.dropped_reason: pa.string()}
        if columns.has_unreadable:
            dropped_types[added.raw_record] = pa.string()
        kept_file = _OutputFile(out, columns, score_types) if expected.kept else None
        dropped_file = _OutputFile(dropped, columns, dropped_types) if dropped is not None else None
        files = [file for file in (kept_file, dropped_file) if file is not None]
        for file in files:
            stack.push(file.discard)
            file.open()
        counts = {"kept": 0, "dropped": 0, "quarantined": 0}
        for record in originals(stage, folder):
            if decisions.is_exhausted and stage.limit is not None:
                break
            decision = decisions.of(record.table.name, record.line)
            counts[decision.outcome] += 1
            target = kept_file if decision.outcome == "kept" else dropped_file
            if target is None:
                continue
            values: dict[str, Any] = {name: decision.scores.get(score) for score, name in added.scores.items()}
            if target is dropped_file:
                values |= {added.dropped_by: decision.by, added.dropped_reason: decision.reason}
                if not record.is_readable:
                    values[added.raw_record] = record.text or None
            target.write(record, values)
        if not decisions.is_exhausted or Counts(**counts) != expected:
            raise RowCountError("kept", f"the numbers of records and decisions differ: {counts}, expected {expected}")
        if _is_changed(stage, folder, identity):
            raise _changed()
        for file in files:
            file.close()
        for file in files:
            file.publish()
    return Outputs(
        kept_file.counts if kept_file else WriteCounts(), dropped_file.counts if dropped_file else None, added
    )


@contextmanager
def _source_errors(stage: Dataset, folder: Path, identity: Any) -> Iterator[None]:
    """Convert errors of reading the sources again to errors of the command."""
    try:
        yield
    except (BadSource, UnavailableFile) as error:
        raise _unreadable(str(error)) from error
    except RowCountError as error:
        if _is_changed(stage, folder, identity):
            raise _changed() from error
        raise


def _is_changed(stage: Dataset, folder: Path, identity: Any) -> bool:
    try:
        return bool(source_identity(stage, folder) != identity)
    except RequestError as error:
        raise _unreadable(error.message) from error


def _changed() -> StageError:
    return StageError(
        "rows",
        "a source changed while it was filtered",
        cause="the decisions apply to rows that may no longer exist",
        remedy="run the same command again",
    )


def _unreadable(reason: str) -> StageError:
    return StageError(
        "rows",
        reason,
        cause="the source can't be read a second time, to write its rows",
        remedy="run the same command again when it is available; the scores are cached",
    )


def _added(columns: SourceColumns, scores: Sequence[str]) -> AddedColumns:
    taken = columns.names
    names = {}
    for score in scores:
        names[score] = score if score not in taken else free_name(f"{score}_score", taken)
        taken.add(names[score])
    by, reason = free_name("dropped_by", taken), free_name("dropped_reason", taken)
    return AddedColumns(names, by, reason, free_name("raw_record", taken))


class _OutputFile:
    """An output file, written under a temporary name until it is complete."""

    def __init__(self, out: Path, columns: SourceColumns, added: dict[str, Any]) -> None:
        self.counts = WriteCounts()
        self._out, self._columns, self._added = out, columns, added
        self._temporary = temporary_name(out)
        self._stack = ExitStack()
        self._writer: Writer | None = None

    def open(self) -> None:
        with self._errors():
            self._out.parent.mkdir(parents=True, exist_ok=True)
            opened = WRITERS[self._out.suffix](self._temporary, self._columns, self._added, self.counts)
            self._writer = self._stack.enter_context(opened)

    def write(self, record: Original, added: dict[str, Any]) -> None:
        assert self._writer is not None, "it is open"
        with self._errors():
            self._writer.write(record, added)
        self.counts.rows += 1

    def close(self) -> None:
        with self._errors():
            self._stack.close()

    def publish(self) -> None:
        with self._errors():
            publish_file(self._temporary, self._out)

    def discard(self, *error: Any) -> None:
        """Exit callback: close the writer and remove the temporary file, which a published file no longer has."""
        with suppress(OSError):
            self._stack.__exit__(*error)
        with suppress(OSError):
            self._temporary.unlink()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise TuneryError(
                f"{self._out} can't be written",
                cause=error.strerror or str(error),
                remedy="free some space or use another path, and run the command again; the scores are cached",
            ) from error
