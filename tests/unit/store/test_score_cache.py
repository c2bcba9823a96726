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
def test_what_was_added_is_found_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int], data: st.DataObject
) -> None:
    kept = ScoreCache(tmp_path_factory.mktemp("scores") / "s")
    added = data.draw(st.lists(st.sampled_from(numbers), unique=True))
    cut = data.draw(st.integers(0, len(added)))
    for name, part in (("a", added[:cut]), ("b", added[cut:])):
        kept.add(name, [table(np.array(part, np.uint64))], rows=data.draw(st.sampled_from([1, 2**22])))
    ids = np.array(numbers, np.uint64)
    known, found = kept.find(ids)
    assert known.tolist() == [number in added for number in numbers]
    if found is None:
        assert not added
    else:
        assert found.equals(table(ids[known]).drop_columns(["id"]))


def test_large_runs_are_split_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_cache, "PARTITION_ROWS", 100)
    ids = np.random.default_rng(0).integers(0, 2**64 - 1, 1000, np.uint64)
    ScoreCache(tmp_path).add("a", (table(ids[start : start + 70]) for start in range(0, 1000, 70)), rows=1000)
    assert len(list((tmp_path / "a").iterdir())) == 16
    known, found = ScoreCache(tmp_path).find(ids[::-1])
    assert known.all()
    assert found is not None
    assert found["score"].to_numpy().tolist() == (ids[::-1].astype(float) / 7).tolist()


def test_large_vectors_are_split_into_more_files_and_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_cache, "PARTITION_BYTES", 1 << 12)
    ids = np.random.default_rng(0).integers(0, 2**64 - 1, 256, np.uint64)
    vectors = np.random.default_rng(1).standard_normal((256, 32)).astype(np.float16)
    whole = pa.table({"id": ids, "score": np.full(256, np.nan), "vector": vector_column(vectors)})
    ScoreCache(tmp_path).add("a", (whole.slice(start, 50) for start in range(0, 256, 50)), rows=256)
    assert len(list((tmp_path / "a").iterdir())) == 4  # 64 bytes a row: 16 KiB in files of 4
    known, found = ScoreCache(tmp_path).find(ids[::-2])
    assert known.all()
    assert found is not None
    np.testing.assert_array_equal(vectors_of(found["vector"]), vectors[::-2])


def test_row_twice_in_a_run_is_kept_once(tmp_path: Path) -> None:
    ids = np.array([5, 5, 3], np.uint64)
    ScoreCache(tmp_path).add("a", [table(ids)], rows=3)
    known, found = ScoreCache(tmp_path).find(ids)
    assert known.all()
    assert found is not None
    assert found["words"].to_pylist() == ["w5", "w5", "w3"]


def test_half_written_run_is_not_seen(tmp_path: Path) -> None:
    def fails() -> object:
        yield table(np.array([1], np.uint64))
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        ScoreCache(tmp_path).add("a", fails(), rows=1)
    assert ScoreCache(tmp_path).find(np.array([1], np.uint64))[1] is None


def test_ids_are_numbers_of_16_hex_digits() -> None:
    assert ids_to_uint64(["00000000000000ff", "ffffffffffffffff"]).tolist() == [255, 2**64 - 1]
    assert ids_to_uint64([]).tolist() == []


def test_many_small_runs_become_one_and_the_large_ones_stay(tmp_path: Path) -> None:
    ids = np.random.default_rng(0).permutation(np.arange(1, 1000, dtype=np.uint64) << np.uint64(50))
    kept = ScoreCache(tmp_path)
    kept.add("large", [table(ids[:500])], 500)
    pieces = np.array_split(ids[500:], score_cache.MAX_RUNS - 1)
    for number, piece in enumerate(pieces):
        before = kept.find(ids)[0]
        kept.add(f"r{number:02d}", [table(piece)], len(piece))
        assert kept.find(ids)[0].sum() == before.sum() + len(piece)
    runs = [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")]
    assert len(runs) == score_cache.MAX_RUNS // 2 + 1
    assert "large" in runs
    assert len([name for name in runs if name.startswith("merged-")]) == 1
    known, found = kept.find(ids)
    assert known.all()
    assert found is not None
    assert found.equals(table(ids).drop_columns(["id"]))


def test_run_that_is_merged_while_it_is_looked_up_is_found_in_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.arange(10, dtype=np.uint64)
    kept = ScoreCache(tmp_path)
    kept.add("a", [table(ids)], 10)
    runs = ScoreCache._runs
    seen: list[int] = []

    def merged_after_listing(self: ScoreCache) -> list[Path]:
        found = runs(self)
        if not seen:
            (tmp_path / "a").rename(tmp_path / "merged-1")
        seen.append(len(found))
        return found

    monkeypatch.setattr(ScoreCache, "_runs", merged_after_listing)
    assert kept.find(ids)[0].all()
    assert seen == [1, 1]
