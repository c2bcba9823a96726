"""Row schema on disk: ids, shards, duplicates."""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunery.ingest import duplicate_count
from tunery.ingest.duplicate_count import DuplicateCount
from tunery.store import rows as store
from tunery.store.rows import Row, read_rows, row_id, shard_path, shards, write_rows, write_tables


def messages(*contents: str) -> list[dict[str, Any]]:
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(contents)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "a text"}, "e524906c052d8514"),
        ({"messages": messages("q", "a")}, "2dbc5682d0d34079"),
        ({"messages": messages("q", "a"), "rejected": messages("b")}, "eae1114ebd9d6e51"),
    ],
)
def test_row_ids_do_not_change_when_columns_are_added(row: Row, expected: str) -> None:
    assert row_id(row) == expected
    nulls = {"label": None, "tools": None, "messages": None, "rejected": None, **row}
    nulls["messages"] = nulls["messages"] and [{**message, "tool_calls": None} for message in nulls["messages"]]
    assert row_id(nulls) == expected


def test_row_id_covers_label_tools_and_tool_calls() -> None:
    row: Row = {"messages": messages("q", "a")}
    with_calls = [messages("q")[0], {"role": "assistant", "content": "a", "tool_calls": "[]"}]
    others = [{**row, "label": True}, {**row, "label": False}, {**row, "tools": "[]"}, {"messages": with_calls}]
    assert len({row_id(other) for other in [row, *others]}) == 5


def texts(count: int, length: int = 1) -> Iterator[Row]:
    for number in range(count):
        yield {"id": f"{number:016x}", "text": str(number % 10) * length, "source": "s", "line": number + 1}


def sizes(folder: Path) -> list[int]:
    return [pq.read_metadata(path).num_rows for path in shards(folder)]


def test_shard_size_grows_with_the_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD", 2)
    assert write_rows(texts(64 * 2 + 64 * 8 + 70), tmp_path) == 64 * 2 + 64 * 8 + 70
    assert sizes(tmp_path) == [2] * 64 + [8] * 64 + [32, 32, 6]
    assert [row["line"] for row in read_rows(tmp_path)] == list(range(1, 64 * 2 + 64 * 8 + 71))


def test_shard_size_is_bounded_in_bytes_and_a_larger_row_has_its_own_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 100)
    lengths = [40, 40, 20, 1, 500, 60, 50, 100, 100]
    rows = [{"id": "0" * 16, "messages": messages("ä" * (length // 2), "x" * (length % 2))} for length in lengths]
    write_rows(rows, tmp_path)
    assert sizes(tmp_path) == [3, 1, 1, 1, 1, 1, 1]


def test_no_rows_are_one_empty_shard(tmp_path: Path) -> None:
    assert write_rows([], tmp_path / "a") == write_tables([], tmp_path / "b") == 0
    assert sizes(tmp_path / "a") == sizes(tmp_path / "b") == [0]
    assert pq.read_schema(shards(tmp_path / "b")[0]).names == store.SCHEMA.names


@given(st.lists(st.integers(0, 120), max_size=12), st.data())
@settings(max_examples=20, derandomize=True)
def test_files_do_not_depend_on_how_rows_are_split_into_tables(lengths: list[int], data: st.DataObject) -> None:
    rows = [{"id": f"{n:016x}", "text": "x" * length, "line": n} for n, length in enumerate(lengths)]
    table = pa.Table.from_pylist([{name: row.get(name) for name in store.SCHEMA.names} for row in rows], store.SCHEMA)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    tables = [table.slice(start, end - start) for start, end in itertools.pairwise([0, *cuts, len(rows)])]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "SHARD", 3)
        patch.setattr(store, "SHARD_BYTES", 100)
        with tempfile.TemporaryDirectory() as folder:
            from_rows, from_tables = Path(folder) / "rows", Path(folder) / "tables"
            assert write_rows(rows, from_rows) == write_tables(tables, from_tables) == len(rows)
            assert [path.read_bytes() for path in shards(from_rows)] == [
                path.read_bytes() for path in shards(from_tables)
            ]
            assert [row["line"] for row in read_rows(from_rows)] == list(range(len(rows)))


@given(st.lists(st.integers(0, 60) | st.integers(2**64 - 9, 2**64 - 1), max_size=80))
@settings(max_examples=20, derandomize=True)
def test_duplicates_are_counted_exactly_in_memory_and_on_disk(ids: list[int]) -> None:
    for in_memory in (7, 1000):
        with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
            patch.setattr(duplicate_count, "MAX_PENDING_IDS", in_memory)
            count = DuplicateCount(Path(folder) / "ids")
            for start in range(0, len(ids), 3):
                count.add(np.array(ids[start : start + 3], dtype=np.uint64))
            assert count.total() == len(ids) - len(set(ids))
            assert not (Path(folder) / "ids").exists()


def test_row_id_of_many_combining_marks_takes_linear_time() -> None:
    begin = time.perf_counter()
    row_id({"text": "a" + "\u0301\u0316" * 500_000})
    assert time.perf_counter() - begin < 5
    assert row_id({"text": "e\u0301 te"}) == row_id({"text": "\u00e9 te"})


def test_shards_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    for number in (100_000, 9, 99_999):
        shard_path(tmp_path / "rows", number).touch()
    assert [path.stem for path in shards(tmp_path)] == ["part-00009", "part-99999", "part-100000"]
