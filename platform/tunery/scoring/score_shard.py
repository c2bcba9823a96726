"""One unit of scoring: a shard of rows through the scorers of one pass, with what is known already left out.

A unit's result is one Parquet file beside the others, renamed into place when it is whole: a job that was killed skips
the units whose files are there. What a unit needs to survive its own death stands in a journal beside it.

A row that kills its worker (a native library's crash, memory) would kill every next one, too. So a unit that died twice
in the same run goes row by row and writes down which one it is about to score; a row that was in hand at a death is
quarantined, and the others are scored. Deaths of other runs don't count: those were somebody's kill.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tunery.errors import TuneryError
from tunery.scoring.scorers.registry import Columns
from tunery.store.rows import Row
from tunery.store.score_cache import ScoreCache, ids_to_uint64
from tunery.store.vectors import is_vectors, vector_column, vectors_of

Array = Any
"""pyarrow's; its stubs want an element type that is not known here."""
MAX_CRASHES = 2
"""So often a unit may die as a whole: once may be somebody's kill, and the same batches give the same bytes."""
MAX_CONSECUTIVE_FAILURES = 20
PIECE = 2048
"""Rows of a unit that are Python objects at a time: what bounds a worker's memory, with the bytes of a shard. The
window, too, within which model scorers sort by length."""
Scored = dict[str, Columns]
"""By score."""


@dataclass(frozen=True)
class ScorePass:
    """Scorers that go over the rows together."""

    scores: tuple[str, ...]
    folder: Path
    """Where the units' files are written."""
    run: str
    """Of this invocation; deaths of others don't count."""
    tables: dict[str, Path] = field(default_factory=dict)
    """By score, the folder of its kept scores; scores without one are worked out anew."""


def score_shard(shard: Path, job: ScorePass, score: Callable[[Sequence[Row], Sequence[str]], Scored]) -> dict[str, int]:
    """Score the rows of `shard`; returns how many were scored, known before, and quarantined.

    `score(rows, scores)` works out the named scores of rows. Writes `<shard>.parquet` (id, the columns of each score,
    known:<score>, lost) and, where rows were quarantined, `<shard>.lost.json`.
    """
    # `planted` is the truth that a filter is judged by: no scorer may see it.
    names = [name for name in pq.read_schema(shard).names if name != "planted"]
    table = pq.read_table(shard, columns=names)
    journal = _Journal(job.folder / f"{shard.stem}.journal", job.run)
    lost: dict[int, str] = {}
    pieces = [
        _score_piece(table.slice(start, PIECE), start, job, score, journal, lost)
        for start in range(0, max(1, len(table)), PIECE)
    ]
    if lost:
        (job.folder / f"{shard.stem}.lost.json").write_text(json.dumps(lost))
    final = job.folder / shard.name
    temporary = final.with_suffix(".tmp")
    pq.write_table(_joined([piece for piece, _ in pieces]), temporary)
    temporary.rename(final)
    journal.remove()
    touched = sum(count for _, count in pieces)
    return {"rows": len(table), "scored": touched - len(lost), "known": len(table) - touched, "lost": len(lost)}


def _score_piece(
    table: pa.Table,
    start: int,
    job: ScorePass,
    score: Callable[[Sequence[Row], Sequence[str]], Scored],
    journal: _Journal,
    lost: dict[int, str],
) -> tuple[pa.Table, int]:
    """The columns of the rows from `start` of the unit, and how many of them some scorer did not know; adds to
    `lost`, by the row's number in the unit."""
    rows = table.to_pylist()
    ids = ids_to_uint64(row["id"] for row in rows)
    columns: dict[str, Array] = {"id": pa.array([row["id"] for row in rows], pa.string())}
    missing = {name: np.ones(len(rows), dtype=bool) for name in job.scores}
    kept: dict[str, pa.Table] = {}
    for name in job.scores:
        if name in job.tables:
            known, found = ScoreCache(job.tables[name]).find(ids)
            missing[name] = ~known
            if found is not None:
                kept[name] = found
    # Scores of one pass share their forwards: rows that lack the same ones go together.
    groups: dict[tuple[str, ...], list[int]] = {}
    for index in range(len(rows)):
        if lacking := tuple(name for name in job.scores if missing[name][index]):
            groups.setdefault(lacking, []).append(index)
    fresh: dict[str, list[tuple[Sequence[int], Columns]]] = {name: [] for name in job.scores}
    for lacking, indices in groups.items():
        for places, told in _try(rows, start, indices, lacking, score, journal, lost):
            for name in lacking:
                fresh[name].append((places, told[name]))
    for name in job.scores:
        columns |= _merge(name, len(rows), kept.get(name), np.flatnonzero(~missing[name]), fresh[name])
        columns[f"known:{name}"] = pa.array(~missing[name])
    columns["lost"] = pa.array([start + index in lost for index in range(len(rows))], pa.bool_())
    return pa.table(columns), sum(len(indices) for indices in groups.values())


def _try(
    rows: Sequence[Row],
    start: int,
    indices: list[int],
    lacking: tuple[str, ...],
    score: Callable[[Sequence[Row], Sequence[str]], Scored],
    journal: _Journal,
    lost: dict[int, str],
) -> list[tuple[Sequence[int], Scored]]:
    """(places, their columns by score) of all rows but those that are lost: all at once, or row by row. `start` is the
    first row's number in the unit."""
    if journal.deaths < MAX_CRASHES:
        try:
            return [(indices, score([rows[index] for index in indices], lacking))]
        except Exception:  # of some row: found one by one below, and told with it
            journal.write("one by one")
    done: list[tuple[Sequence[int], Scored]] = []
    failed: list[int] = []
    for index in indices:
        number = start + index
        if journal.in_hand[number]:
            lost[number] = f"its worker died {journal.deaths} times, in the end over this row alone"
            continue
        journal.write(f"row {number}")
        try:
            done.append(([index], score([rows[index]], lacking)))
        except Exception as error:
            lost[number] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            failed.append(index)
            if not done and len(failed) == MAX_CONSECUTIVE_FAILURES:
                # Not the rows: whatever is wrong is wrong with all of them, and must not empty the dataset one by one.
                raise _hopeless(rows[failed[0]], lost[start + failed[0]], lacking, error) from error
    return done


def _hopeless(first: Row, reason: str, scores: Sequence[str], error: Exception) -> Exception:
    """The same error when memory ran out, which has a remedy of its own (pipeline/diagnose.py)."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return error
    return TuneryError(
        f"none of {MAX_CONSECUTIVE_FAILURES} rows one after the other can be scored ({', '.join(scores)})",
        cause=f"row {first['id']} ({first['source']}, line {first['line']}): {reason}",
        remedy="correct the stage's `by`, or the rows where the cause lies in them; then the same command resumes",
    )


def _merge(
    score: str, count: int, kept: pa.Table | None, known: np.ndarray, fresh: Sequence[tuple[Sequence[int], Columns]]
) -> dict[str, Array]:
    """The columns of a score, from what was known and what is new; NaN for lost rows. `<score>` is the score itself,
    `<score>:<key>` what explains it: no name of a score holds a colon."""
    keys = list(fresh[0][1]) if fresh else kept.column_names if kept is not None else ["score"]
    result: dict[str, Array] = {}
    for key in keys:
        named = score if key == "score" else f"{score}:{key}"
        if any(isinstance(told[key], np.ndarray) for _, told in fresh) or (
            kept is not None and is_vectors(kept.schema.field(key).type)
        ):
            result[named] = _merge_vectors(key, count, kept, known, fresh)
            continue
        values: list[Any] = [float("nan") if key == "score" else None] * count
        if kept is not None:
            for index, value in zip(known.tolist(), kept[key].to_pylist(), strict=True):
                values[index] = value
        for places, told in fresh:
            for index, value in zip(places, told[key], strict=True):
                values[index] = value
        array = pa.array(values, pa.float64()) if key == "score" else pa.array(values)
        result[named] = array
    return result


def _merge_vectors(
    key: str, count: int, kept: pa.Table | None, known: np.ndarray, fresh: Sequence[tuple[Sequence[int], Columns]]
) -> Array:
    """The same for vectors, which no Python list would hold: NaN for lost rows."""
    pieces: list[tuple[Any, np.ndarray]] = [(places, np.asarray(told[key])) for places, told in fresh]
    if kept is not None:
        pieces.append((known, vectors_of(kept[key])))
    vectors_nh = np.full((count, pieces[0][1].shape[1]), np.nan, np.float16)
    for places, piece_mh in pieces:
        vectors_nh[places] = piece_mh
    return vector_column(vectors_nh)


def _joined(pieces: Sequence[pa.Table]) -> pa.Table:
    """One chunk a column: pages of the file end where chunks do. A piece whose rows are all lost lacks columns."""
    table = pa.concat_tables(pieces, promote_options="default").combine_chunks()
    for index, column in enumerate(table.schema):
        # A column of nothing but nulls has no type, and shards must agree: numbers that are missing are NaN, not null.
        if pa.types.is_null(column.type):
            table = table.set_column(index, column.name, table[column.name].cast(pa.string()))
    return table


class _Journal:
    """Lines "begin RUN" and "row I", appended before each is done; gone when the unit is whole."""

    def __init__(self, path: Path, run: str) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path.exists() else []
        begins = [line for line in lines if line.startswith("begin ")]
        self.in_hand: Counter[int] = Counter()
        self.deaths = 0
        mine = False
        last: int | None = None
        for line in [*lines, f"begin {run}"]:
            if line.startswith("begin "):
                if mine:
                    self.deaths += 1
                    if last is not None:
                        self.in_hand[last] += 1
                mine, last = line == f"begin {run}", None
            elif line.startswith("row "):
                last = int(line[4:])
        assert self.deaths <= len(begins)
        self.write(f"begin {run}")

    def write(self, line: str) -> None:
        with self._path.open("a") as file:
            file.write(line + "\n")

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
