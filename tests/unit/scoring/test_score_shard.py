"""Scoring of a shard: cached scores are reused, rows that crash the worker are quarantined, others kept."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from tunery.errors import TuneryError
from tunery.scoring.score_shard import (
    CHUNK_ROWS,
    CRASHES_BEFORE_SINGLE_ROWS,
    MAX_CONSECUTIVE_FAILURES,
    Scored,
    ScorePass,
    score_shard,
)
from tunery.store.rows import Row, row_id, shards, write_rows
from tunery.store.score_cache import ScoreCache, ids_to_uint64
from tunery.store.vectors import vectors_of


class WorkerKilled(BaseException):
    """Simulates the death of a worker process."""


def rows_of(count: int) -> list[Row]:
    rows: list[Row] = [
        {"text": f"row {n}", "injected_corruption": "cut", "source": "rows.jsonl", "line": n} for n in range(count)
    ]
    return [{**row, "id": row_id(row)} for row in rows]


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    write_rows(rows_of(10), tmp_path / "data")
    (path,) = shards(tmp_path / "data")
    return path


@pytest.fixture(params=[CHUNK_ROWS, 4], ids=["one chunk", "three chunks"])
def chunk_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunery.scoring.score_shard.CHUNK_ROWS", request.param)


def job(folder: Path, run: str = "1", scores: tuple[str, ...] = ("a",), **tables: Path) -> ScorePass:
    (folder / "out").mkdir(exist_ok=True)
    return ScorePass(scores, folder / "out", run, tables)


def score_rows(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
    values = [float(row["text"].split()[1]) for row in rows]
    return {score: {"score": values, "why": [row["text"] for row in rows]} for score in scores}


def result(folder: Path, shard: Path) -> dict[str, list[Any]]:
    actual: dict[str, list[Any]] = pq.read_table(folder / "out" / shard.name).to_pydict()
    return actual


def test_shard_result_has_one_line_per_row_and_corruption_is_hidden(shard: Path, tmp_path: Path) -> None:
    recorded: list[Row] = []

    def score(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        recorded.extend(rows)
        return score_rows(rows, scores)

    assert score_shard(shard, job(tmp_path), score) == {"rows": 10, "scored": 10, "cached": 0, "failed": 0}
    actual = result(tmp_path, shard)
    assert actual["id"] == [row["id"] for row in rows_of(10)]
    assert actual["a"] == [float(n) for n in range(10)]
    assert actual["a:why"] == [f"row {n}" for n in range(10)]
    assert all("injected_corruption" not in row for row in recorded)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [shard.name], "only the result remains"


def test_cached_rows_are_not_scored_again(shard: Path, tmp_path: Path, chunk_size: None) -> None:
    score_shard(shard, job(tmp_path), score_rows)
    scored_table = pq.read_table(tmp_path / "out" / shard.name).take([1, 4])
    table = scored_table.select(["a", "a:why"]).rename_columns(["score", "why"])
    cached = table.append_column("id", [ids_to_uint64(scored_table["id"].to_pylist())])
    ScoreCache(tmp_path / "cache").add("r", [cached.select(["id", "score", "why"])], 2)
    requests: list[str] = []

    def score(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        requests.extend(row["text"] for row in rows)
        return score_rows(rows, scores)

    before = result(tmp_path, shard)
    output = score_shard(shard, job(tmp_path, "2", a=tmp_path / "cache"), score)
    assert output == {"rows": 10, "scored": 8, "cached": 2, "failed": 0}
    assert requests == [f"row {n}" for n in range(10) if n not in (1, 4)]
    after = result(tmp_path, shard)
    assert after["cached:a"] == [n in (1, 4) for n in range(10)]
    assert {name: after[name] for name in ("id", "a", "a:why")} == {name: before[name] for name in ("id", "a", "a:why")}


def test_row_that_raises_is_quarantined_with_its_reason(shard: Path, tmp_path: Path, chunk_size: None) -> None:
    def score(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        if any(row["text"] == "row 3" for row in rows):
            raise ValueError("a strange row")
        return score_rows(rows, scores)

    assert score_shard(shard, job(tmp_path), score) == {"rows": 10, "scored": 9, "cached": 0, "failed": 1}
    actual = result(tmp_path, shard)
    assert actual["failed"] == [n == 3 for n in range(10)]
    assert math.isnan(actual["a"][3])
    assert actual["a"][4] == 4.0
    reasons = json.loads((tmp_path / "out" / f"{shard.stem}.failed.json").read_text())
    assert reasons == {"3": "ValueError: a strange row"}


def test_error_of_every_row_is_raised_instead_of_quarantining_all(tmp_path: Path) -> None:
    write_rows(rows_of(50), tmp_path / "many")

    def score(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        raise ValueError("the model is broken")

    with pytest.raises(TuneryError, match=f"{MAX_CONSECUTIVE_FAILURES} consecutive rows could not be scored") as raised:
        score_shard(shards(tmp_path / "many")[0], job(tmp_path), score)
    first = rows_of(50)[0]
    assert raised.value.cause == (
        f"row {first['id']} ({first['source']}, line {first['line']}): ValueError: the model is broken"
    )
    assert "run the same command again" in raised.value.remedy


def test_out_of_memory_is_raised_unchanged(tmp_path: Path) -> None:
    write_rows(rows_of(50), tmp_path / "many")

    def score(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        raise MemoryError("no 3 GB left")

    with pytest.raises(MemoryError):
        score_shard(shards(tmp_path / "many")[0], job(tmp_path), score)


def test_row_that_crashes_its_worker_is_quarantined_after_max_crashes(
    shard: Path, tmp_path: Path, chunk_size: None
) -> None:
    scored: list[str] = []

    def score(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        if any(row["text"] == "row 6" for row in rows):
            raise WorkerKilled
        scored.extend(row["text"] for row in rows)
        return score_rows(rows, scores)

    for _ in range(CRASHES_BEFORE_SINGLE_ROWS + 1):  # first all rows, then single rows
        with pytest.raises(WorkerKilled):
            score_shard(shard, job(tmp_path), score)
    assert score_shard(shard, job(tmp_path), score) == {"rows": 10, "scored": 9, "cached": 0, "failed": 1}
    assert result(tmp_path, shard)["failed"] == [n == 6 for n in range(10)]
    assert "its worker crashed 3 times" in (tmp_path / "out" / f"{shard.stem}.failed.json").read_text()


def test_crashes_of_other_runs_do_not_count(shard: Path, tmp_path: Path) -> None:
    def crash(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        raise WorkerKilled

    for run in ("1", "2", "3", "4"):
        with pytest.raises(WorkerKilled):
            score_shard(shard, job(tmp_path, run), crash)
    batches: list[int] = []

    def score(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        batches.append(len(rows))
        return score_rows(rows, scores)

    assert score_shard(shard, job(tmp_path, "5"), score)["failed"] == 0
    assert batches == [10], "in one batch, because no row is suspected"


def test_chunk_whose_rows_all_failed_keeps_its_position(
    shard: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tunery.scoring.score_shard.CHUNK_ROWS", 4)

    def score(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        if any(4 <= row["line"] < 8 for row in rows):
            raise ValueError("a strange row")
        return {"a": {"score": [1.0] * len(rows), "signature": [b"x"] * len(rows)}}

    assert score_shard(shard, job(tmp_path), score)["failed"] == 4
    actual = result(tmp_path, shard)
    assert actual["failed"] == [4 <= n < 8 for n in range(10)]
    assert actual["a:signature"] == [None if 4 <= n < 8 else b"x" for n in range(10)]
    assert set(json.loads((tmp_path / "out" / f"{shard.stem}.failed.json").read_text())) == {"4", "5", "6", "7"}


def test_rows_that_miss_the_same_scores_are_scored_together(shard: Path, tmp_path: Path) -> None:
    score_shard(shard, job(tmp_path), score_rows)
    scored_table = pq.read_table(tmp_path / "out" / shard.name).slice(0, 6)
    cached = scored_table.select(["a", "a:why"]).rename_columns(["score", "why"])
    cached = cached.append_column("id", [ids_to_uint64(scored_table["id"].to_pylist())]).select(["id", "score", "why"])
    ScoreCache(tmp_path / "cache").add("r", [cached], 6)
    requests: list[tuple[int, tuple[str, ...]]] = []

    def score(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        requests.append((len(rows), tuple(scores)))
        return score_rows(rows, scores)

    (tmp_path / "both").mkdir()
    both = ScorePass(("a", "b"), tmp_path / "both", "2", {"a": tmp_path / "cache"})
    score_shard(shard, both, score)
    assert sorted(requests) == [(4, ("a", "b")), (6, ("b",))]
    actual = pq.read_table(tmp_path / "both" / shard.name).to_pydict()
    assert actual["a"] == actual["b"] == [float(n) for n in range(10)]


def test_vectors_are_merged_for_cached_new_and_failed_rows(shard: Path, tmp_path: Path) -> None:
    def score(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        numbers = [int(row["text"].split()[1]) for row in rows]
        if 3 in numbers:
            raise ValueError("a strange row")
        vectors = np.array([[number, 0.5, -number] for number in numbers], np.float16)
        return {name: {"score": [math.nan] * len(rows), "vector": vectors} for name in scores}

    score_shard(shard, job(tmp_path), score)
    scored_table = pq.read_table(tmp_path / "out" / shard.name)
    expected = [[math.nan] * 3 if n == 3 else [n, 0.5, -n] for n in range(10)]
    assert str(scored_table["a:vector"].type) == "fixed_size_list<element: halffloat>[3]"
    np.testing.assert_array_equal(vectors_of(scored_table["a:vector"]), expected)
    cached = scored_table.select(["a", "a:vector"]).rename_columns(["score", "vector"]).take([1, 4])
    cached = cached.append_column("id", [ids_to_uint64(scored_table.take([1, 4])["id"].to_pylist())])
    ScoreCache(tmp_path / "cache").add("r", [cached], 2)
    assert score_shard(shard, job(tmp_path, "2", a=tmp_path / "cache"), score)["cached"] == 2
    rescored = pq.read_table(tmp_path / "out" / shard.name)
    assert rescored["cached:a"].to_pylist() == [n in (1, 4) for n in range(10)]
    np.testing.assert_array_equal(vectors_of(rescored["a:vector"]), expected)


def test_first_crash_does_not_change_the_batches(shard: Path, tmp_path: Path) -> None:
    batches: list[int] = []

    def crash_once(rows: Sequence[Row], scores: Sequence[str]) -> Scored:
        batches.append(len(rows))
        if len(batches) == 1:
            raise WorkerKilled
        return score_rows(rows, scores)

    with pytest.raises(WorkerKilled):
        score_shard(shard, job(tmp_path), crash_once)
    assert score_shard(shard, job(tmp_path), crash_once)["failed"] == 0
    assert batches == [10, 10]
