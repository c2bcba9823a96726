"""Cached scores: looked up by row id, in any order, from all runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.store import score_cache
from tunery.store.score_cache import ScoreCache, ids_to_uint64
from tunery.store.vectors import vector_column, vectors_of


def table(ids: np.ndarray) -> pa.Table:
    return pa.table({"id": ids, "score": ids.astype(float) / 7, "words": [f"w{value}" for value in ids.tolist()]})


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60, unique=True), st.data())
def test_exactly_the_added_rows_are_found(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], data: st.DataObject
) -> None:
    cache = ScoreCache(tmp_path_factory.mktemp("scores") / "s")
    added = data.draw(st.lists(st.sampled_from(numbers), unique=True))
    middle = data.draw(st.integers(0, len(added)))
    for name, part in (("a", added[:middle]), ("b", added[middle:])):
        cache.add(name, [table(np.array(part, np.uint64))], rows=data.draw(st.sampled_from([1, 2**22])))
    ids = np.array(numbers, np.uint64)
    is_cached, scores = cache.find(ids)
    assert is_cached.tolist() == [number in added for number in numbers]
    if scores is None:
        assert not added
    else:
        assert scores.equals(table(ids[is_cached]).drop_columns(["id"]))


def test_large_run_is_split_into_files_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_cache, "PARTITION_ROWS", 100)
    ids = np.random.default_rng(0).integers(0, 2**64 - 1, 1000, np.uint64)
    ScoreCache(tmp_path).add("a", (table(ids[start : start + 70]) for start in range(0, 1000, 70)), rows=1000)
    assert len(list((tmp_path / "a").iterdir())) == 16
    is_cached, scores = ScoreCache(tmp_path).find(ids[::-1])
    assert is_cached.all()
    assert scores is not None
    assert scores["score"].to_numpy().tolist() == (ids[::-1].astype(float) / 7).tolist()


def test_run_with_large_vectors_is_split_by_bytes_and_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_cache, "PARTITION_BYTES", 1 << 12)
    ids = np.random.default_rng(0).integers(0, 2**64 - 1, 256, np.uint64)
    vectors = np.random.default_rng(1).standard_normal((256, 32)).astype(np.float16)
    scored = pa.table({"id": ids, "score": np.full(256, np.nan), "vector": vector_column(vectors)})
    ScoreCache(tmp_path).add("a", (scored.slice(start, 50) for start in range(0, 256, 50)), rows=256)
    assert len(list((tmp_path / "a").iterdir())) == 4  # 64 bytes a row: 16 KiB in files of 4
    is_cached, scores = ScoreCache(tmp_path).find(ids[::-2])
    assert is_cached.all()
    assert scores is not None
    np.testing.assert_array_equal(vectors_of(scores["vector"]), vectors[::-2])


def test_duplicate_rows_of_a_run_are_found(tmp_path: Path) -> None:
    ids = np.array([5, 5, 3], np.uint64)
    ScoreCache(tmp_path).add("a", [table(ids)], rows=3)
    is_cached, scores = ScoreCache(tmp_path).find(ids)
    assert is_cached.all()
    assert scores is not None
    assert scores["words"].to_pylist() == ["w5", "w5", "w3"]


def test_partially_written_run_is_ignored(tmp_path: Path) -> None:
    def failing_tables() -> object:
        yield table(np.array([1], np.uint64))
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        ScoreCache(tmp_path).add("a", failing_tables(), rows=1)
    assert ScoreCache(tmp_path).find(np.array([1], np.uint64))[1] is None


def test_ids_are_numbers_of_16_hex_digits() -> None:
    assert ids_to_uint64(["00000000000000ff", "ffffffffffffffff"]).tolist() == [255, 2**64 - 1]
    assert ids_to_uint64([]).tolist() == []


def test_small_runs_are_merged_and_large_ones_are_kept(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).permutation(np.arange(1, 1000, dtype=np.uint64) << np.uint64(50))
    cache = ScoreCache(tmp_path)
    cache.add("large", [table(ids[:500])], 500)
    parts = np.array_split(ids[500:], score_cache.MAX_RUNS - 1)
    for number, part in enumerate(parts):
        before = cache.find(ids)[0]
        cache.add(f"r{number:02d}", [table(part)], len(part))
        assert cache.find(ids)[0].sum() == before.sum() + len(part)
    runs = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(runs) == score_cache.MAX_RUNS // 2 + 1
    assert "large" in runs
    assert len([name for name in runs if name.startswith("merged-")]) == 1
    is_cached, scores = cache.find(ids)
    assert is_cached.all()
    assert scores is not None
    assert scores.equals(table(ids).drop_columns(["id"]))


def test_run_that_is_merged_during_a_lookup_is_found_in_the_merged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(10, dtype=np.uint64)
    cache = ScoreCache(tmp_path)
    cache.add("a", [table(ids)], 10)
    list_runs = ScoreCache._runs
    listed: list[int] = []

    def merge_after_listing(self: ScoreCache) -> list[Path]:
        runs = list_runs(self)
        if not listed:
            (tmp_path / "a").rename(tmp_path / "merged-1")
        listed.append(len(runs))
        return runs

    monkeypatch.setattr(ScoreCache, "_runs", merge_after_listing)
    assert cache.find(ids)[0].all()
    assert listed == [1, 1]
