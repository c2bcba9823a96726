"""Scoring of one shard: its rows go through the scorers of one pass, except for scores that are already cached.

The result of a shard is one Parquet file, renamed into place when it is complete; a resumed stage skips shards that
have their file (`scored_rows`). A journal file next to it records crashes.

A row that crashes its worker (a native library, out of memory) would also crash every retry. After two crashes in the
same run, a shard is therefore scored row by row, and each row is written to the journal before it is scored. A row
being scored at the time of a crash is quarantined, and the others are scored. Crashes of other runs are not counted,
because those runs may have been killed from outside.
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
from tunery.scoring.scorers.interfaces import Columns
from tunery.store.atomic_write import read_json, replace_file, write_text
from tunery.store.rows import Row
from tunery.store.score_cache import ScoreCache, ids_to_uint64
from tunery.store.vectors import is_vectors, vector_column, vectors_of

Array = Any
"""A pyarrow array; the stubs of pyarrow require an element type that is not known here."""
CRASHES_BEFORE_SINGLE_ROWS = 2
"""Number of crashes after which a shard is scored row by row. The first retry is in full batches, because the crash may
have come from outside, and only the same batches give the same bytes."""
MAX_CONSECUTIVE_FAILURES = 20
CHUNK_ROWS = 2048
"""Number of rows converted to Python objects at a time, which bounds the memory of a worker. Model scorers sort rows by
length within a chunk."""
Scored = dict[str, Columns]
"""Columns by score."""
ScoreFn = Callable[[Sequence[Row], Sequence[str]], Scored]
"""`score(rows, scores)` computes the named scores of rows."""


@dataclass(frozen=True)
class ScorePass:
    """Scorers that are applied to the rows in the same pass."""

    scores: tuple[str, ...]
    folder: Path
    """Output folder of the shards' results."""
    run: str
    """Id of this run; crashes of other runs are not counted."""
    cache_dirs: dict[str, Path] = field(default_factory=dict)
    """Score cache folder by score; scores without one are always recomputed."""


def score_shard(shard: Path, score_pass: ScorePass, score: ScoreFn, crashes: int | None = None) -> dict[str, int]:
    """Score the rows of `shard`; return the number of rows scored, cached, and quarantined ("failed"). `crashes`: how
    many workers crashed on this shard in this run; None if every earlier attempt ended with a crash.

    Writes `<shard>.parquet` (id, the columns of each score, cached:<score>, failed) and, if rows were quarantined,
    `<shard>.failed.json`.
    """
    # `injected_corruption` is the ground truth that filters are evaluated on, so no scorer may read it.
    names = [name for name in pq.read_schema(shard).names if name != "injected_corruption"]
    table = pq.read_table(shard, columns=names)
    journal = _Journal(score_pass.folder / f"{shard.stem}.journal", score_pass.run, crashes)
    failures: dict[int, str] = {}
    chunks = [
        _score_chunk(table.slice(start, CHUNK_ROWS), start, score_pass, score, journal, failures)
        for start in range(0, max(1, len(table)), CHUNK_ROWS)
    ]
    reasons = failures_path(score_pass, shard)
    if failures:
        write_text(reasons, json.dumps(failures))
    else:
        reasons.unlink(missing_ok=True)  # of an attempt whose table was truncated
    with replace_file(score_pass.folder / shard.name) as temporary:
        pq.write_table(_concat([chunk for chunk, _ in chunks]), temporary)
    journal.remove()
    num_uncached = sum(count for _, count in chunks)
    return {
        "rows": len(table),
        "scored": num_uncached - len(failures),
        "cached": len(table) - num_uncached,
        "failed": len(failures),
    }


def failures_path(score_pass: ScorePass, shard: Path) -> Path:
    """File with the reason of each quarantined row of the shard, by index; absent if there is none."""
    return score_pass.folder / f"{shard.stem}.failed.json"


def scored_rows(score_pass: ScorePass, shard: Path) -> int | None:
    """Return the number of rows of a shard whose scores are complete; None if it is to be scored. Truncated files count
    as absent: a Parquet file ends with the description of its content."""
    try:
        table = pq.ParquetFile(score_pass.folder / shard.name)
        num_failed = table.read(columns=["failed"])[0].to_pylist().count(True)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    if num_failed and read_json(failures_path(score_pass, shard)) is None:
        return None
    return int(table.metadata.num_rows)


def _score_chunk(
    table: pa.Table, start: int, score_pass: ScorePass, score: ScoreFn, journal: _Journal, failures: dict[int, str]
) -> tuple[pa.Table, int]:
    """Return the score columns of `table`, the rows of the shard from index `start`, and the number of its rows with a
    score that was not cached. Adds to `failures`, keyed by the index of the row in the shard."""
    rows = table.to_pylist()
    ids = ids_to_uint64(row["id"] for row in rows)
    columns: dict[str, Array] = {"id": pa.array([row["id"] for row in rows], pa.string())}
    is_missing = {name: np.ones(len(rows), dtype=bool) for name in score_pass.scores}
    cached: dict[str, pa.Table] = {}
    for name in score_pass.scores:
        if name in score_pass.cache_dirs:
            is_cached, cached_columns = ScoreCache(score_pass.cache_dirs[name]).find(ids)
            is_missing[name] = ~is_cached
            if cached_columns is not None:
                cached[name] = cached_columns
    # The scores of a pass share forward passes, so rows that miss the same scores are scored together.
    groups: dict[tuple[str, ...], list[int]] = {}
    for index in range(len(rows)):
        if missing := tuple(name for name in score_pass.scores if is_missing[name][index]):
            groups.setdefault(missing, []).append(index)
    new: dict[str, list[tuple[Sequence[int], Columns]]] = {name: [] for name in score_pass.scores}
    for missing, group in groups.items():
        for indices, scored in _score_rows(rows, start, group, missing, score, journal, failures):
            for name in missing:
                new[name].append((indices, scored[name]))
    for name in score_pass.scores:
        columns |= _merge(name, len(rows), cached.get(name), np.flatnonzero(~is_missing[name]), new[name])
        columns[f"cached:{name}"] = pa.array(~is_missing[name])
    columns["failed"] = pa.array([start + index in failures for index in range(len(rows))], pa.bool_())
    return pa.table(columns), sum(len(group) for group in groups.values())


def _score_rows(
    rows: Sequence[Row],
    start: int,
    indices: list[int],
    scores: tuple[str, ...],
    score: ScoreFn,
    journal: _Journal,
    failures: dict[int, str],
) -> list[tuple[Sequence[int], Scored]]:
    """Return (indices, their columns by score) of all rows that can be scored, in one call or row by row. `start` is
    the index in the shard of the first row."""
    if journal.num_crashes < CRASHES_BEFORE_SINGLE_ROWS:
        try:
            return [(indices, score([rows[index] for index in indices], scores))]
        except Exception:  # the row that raised is identified below and quarantined with its error
            journal.write("one by one")
    done: list[tuple[Sequence[int], Scored]] = []
    failed: list[int] = []
    for index in indices:
        shard_index = start + index
        if journal.crashes_by_row[shard_index]:
            failures[shard_index] = f"its worker crashed {journal.num_crashes} times, the last time on this row alone"
            continue
        journal.write(f"row {shard_index}")
        try:
            done.append(([index], score([rows[index]], scores)))
        except Exception as error:
            failures[shard_index] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            failed.append(index)
            if not done and len(failed) == MAX_CONSECUTIVE_FAILURES:
                # The cause affects all rows, so stop before the complete dataset is quarantined.
                raise _all_failed_error(rows[failed[0]], failures[start + failed[0]], scores, error) from error
    return done


def _all_failed_error(first: Row, reason: str, scores: Sequence[str], error: Exception) -> Exception:
    """Out-of-memory errors are returned unchanged: pipeline/diagnose.py has a remedy for them."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return error
    return TuneryError(
        f"{MAX_CONSECUTIVE_FAILURES} consecutive rows could not be scored ({', '.join(scores)})",
        cause=f"row {first['id']} ({first['source']}, line {first['line']}): {reason}",
        remedy="correct the `by` of the stage, or these rows; then run the same command again: it resumes",
    )


def _merge(
    score: str,
    count: int,
    cached: pa.Table | None,
    cached_indices: np.ndarray,
    new: Sequence[tuple[Sequence[int], Columns]],
) -> dict[str, Array]:
    """Return the columns of a score, merged from cached and new values; NaN for failed rows.

    `<score>` is the score itself, `<score>:<key>` a column that explains it; names of scores contain no colon.
    """
    keys = list(new[0][1]) if new else cached.column_names if cached is not None else ["score"]
    result: dict[str, Array] = {}
    for key in keys:
        name = score if key == "score" else f"{score}:{key}"
        if any(isinstance(columns[key], np.ndarray) for _, columns in new) or (
            cached is not None and is_vectors(cached.schema.field(key).type)
        ):
            result[name] = _merge_vectors(key, count, cached, cached_indices, new)
            continue
        values: list[Any] = [float("nan") if key == "score" else None] * count
        if cached is not None:
            for index, value in zip(cached_indices.tolist(), cached[key].to_pylist(), strict=True):
                values[index] = value
        for indices, columns in new:
            for index, value in zip(indices, columns[key], strict=True):
                values[index] = value
        array = pa.array(values, pa.float64()) if key == "score" else pa.array(values)
        result[name] = array
    return result


def _merge_vectors(
    key: str,
    count: int,
    cached: pa.Table | None,
    cached_indices: np.ndarray,
    new: Sequence[tuple[Sequence[int], Columns]],
) -> Array:
    """`_merge` for a column of vectors, without Python lists; NaN for failed rows."""
    parts: list[tuple[Any, np.ndarray]] = [(indices, np.asarray(columns[key])) for indices, columns in new]
    if cached is not None:
        parts.append((cached_indices, vectors_of(cached[key])))
    vectors_nh = np.full((count, parts[0][1].shape[1]), np.nan, np.float16)
    for indices, part_mh in parts:
        vectors_nh[indices] = part_mh
    return vector_column(vectors_nh)


def _concat(chunks: Sequence[pa.Table]) -> pa.Table:
    """Concatenate tables into one chunk per column, because Parquet pages end at chunk boundaries. A table whose rows
    all failed lacks columns."""
    table = pa.concat_tables(chunks, promote_options="default").combine_chunks()
    for index, column in enumerate(table.schema):
        # An all-null column has no type, and shards must have the same schema. Missing numbers are NaN, so it is text.
        if pa.types.is_null(column.type):
            table = table.set_column(index, column.name, table[column.name].cast(pa.string()))
    return table


class _Journal:
    """A file with the lines "begin RUN CRASHES" and "row INDEX", each appended before it is done; removed when the
    shard is complete.

    An attempt crashed if the number of crashes is higher at the beginning of the next one. Otherwise it was interrupted
    by the death of another worker, after which Ray Train restarts all.
    """

    def __init__(self, path: Path, run: str, crashes: int | None) -> None:
        self._path = path
        text = path.read_text(errors="replace") if path.exists() else ""
        complete = text[: text.rfind("\n") + 1]
        if complete != text:  # the writer was killed, or the disk was full
            write_text(path, complete)
        lines = complete.splitlines()
        attempts = sum(line.startswith(f"begin {run} ") for line in lines)
        begin = f"begin {run} {attempts if crashes is None else crashes}"
        self.crashes_by_row: Counter[int] = Counter()
        self.num_crashes = 0
        crashes_before: int | None = None
        last_row: int | None = None
        for line in [*lines, begin]:
            if line.startswith("begin "):
                _, line_run, number = line.split(" ")
                if line_run == run:
                    if crashes_before is not None and int(number) > crashes_before:
                        self.num_crashes += 1
                        if last_row is not None:
                            self.crashes_by_row[last_row] += 1
                    crashes_before = int(number)
                last_row = None
            elif line.startswith("row "):
                last_row = int(line[4:])
        self.write(begin)

    def write(self, line: str) -> None:
        with self._path.open("a") as file:
            file.write(line + "\n")

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)
