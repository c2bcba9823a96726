"""Reading in parallel gives exactly the rows of sequential reading."""

from __future__ import annotations

import dataclasses
import gzip
import json
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from in_process import stage_context

from tunery.ingest import parallel_read
from tunery.ingest.duplicate_count import DuplicateCount
from tunery.ingest.filesystem import File, UnavailableFile, local_file
from tunery.ingest.parallel_read import SourceReader, read_in_parallel, read_tasks
from tunery.ingest.read import Quarantined, ReadCounts, as_tables, read_source
from tunery.ingest.sources import resolve_sources
from tunery.spec import Dataset
from tunery.store import StageContext
from tunery.store.rows import read_rows, shards, write_tables

LINES = st.sampled_from(
    [
        b"",
        b" ",
        b"\r",
        b'{"text": "a"}',
        b'{"text": "a", "topic": "x"}',
        b'{"text": "b b b"}\r',
        b"no json",
        b'{"text": "' + b"x" * 90 + b'"}',
        b"\xff",
    ]
)


def dataset(source: str | tuple[str, ...], **fields: Any) -> Dataset:
    return Dataset(kind="dataset", source=source, **fields)


def context(stage: Dataset, folder: Path) -> StageContext:
    return stage_context(
        stage,
        {},
        folder,
        name="rows",
        out=folder / "out",
        staging_dir=folder / "work",
        scores=folder / "scores",
    )


ReadOutcome = tuple[list[bytes], list[Quarantined], ReadCounts]


def read_sequentially(stage: Dataset, folder: Path) -> ReadOutcome:
    quarantined: list[Quarantined] = []
    counts = ReadCounts()
    write_tables(as_tables(read_source(stage, folder, quarantined.append, counts), counts), folder / "one")
    return [path.read_bytes() for path in shards(folder / "one")], quarantined, counts


def read_in_tasks(stage: Dataset, folder: Path) -> ReadOutcome:
    quarantined: list[Quarantined] = []
    counts = ReadCounts()
    shutil.rmtree(folder / "out", ignore_errors=True)
    duplicates = DuplicateCount(folder / "ids")
    read_in_parallel(context(stage, folder), stage, quarantined.append, counts, duplicates)
    return [path.read_bytes() for path in shards(folder / "out")], quarantined, counts


@given(
    st.lists(LINES, max_size=8), st.booleans(), st.booleans(), st.integers(3, 60), st.sampled_from(["jsonl", "text"])
)
@example([b'{"text": "a"}', b'{"text": "b"}'], True, False, 14, "jsonl")  # a range ends with a line
@example([b"", b"", b""], True, False, 1, "jsonl")
@settings(max_examples=20, derandomize=True)
def test_byte_ranges_of_a_file_give_the_rows_of_the_file(
    lines: list[bytes], final_newline: bool, bom: bool, range_bytes: int, file_format: str
) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(parallel_read, "RANGE_BYTES", range_bytes)
        folder = Path(name)
        content = (b"\xef\xbb\xbf" if bom else b"") + b"\n".join(lines) + (b"\n" if final_newline else b"")
        (folder / "a").write_bytes(content)
        stage = dataset("a", format=file_format)
        assert len(read_tasks(resolve_sources(stage, folder), stage)) == max(1, -(-len(content) // range_bytes))
        assert read_in_tasks(stage, folder) == read_sequentially(stage, folder)


def test_each_file_is_a_task_and_only_uncompressed_line_formats_are_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parallel_read, "RANGE_BYTES", 50)
    rows = [{"question": f"q{n}", "answer": "a" * n} for n in range(20)]
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "c.json").write_text(json.dumps(rows))
    (tmp_path / "d.csv").write_text('question,answer\n"one\nline",two\nlost\n')
    stage = dataset(("a.jsonl", "*.gz", "c.json", "d.csv", "a.jsonl"), split="train", eval_fraction=0.2)
    tasks = read_tasks(resolve_sources(stage, tmp_path), stage)
    assert [task.name for task in tasks if isinstance(task, File) and task.span is None] == [
        "b.jsonl.gz",
        "c.json",
        "d.csv",
    ]
    assert len([task for task in tasks if task.name == "a.jsonl"]) > 10
    outcome = read_in_tasks(stage, tmp_path)
    assert outcome == read_sequentially(stage, tmp_path)
    assert outcome[2].other_splits
    assert not list((tmp_path / "work").iterdir())


def test_finished_tasks_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_read, "RANGE_BYTES", 20)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    stage = dataset("a.jsonl")
    run_read_task = parallel_read.run_read_task
    started: list[str] = []

    def interrupt_second_task(task: Any, stage: Dataset, out: Path) -> int:
        started.append(out.name)
        if len(started) == 2:
            raise KeyboardInterrupt
        return run_read_task(task, stage, out)

    monkeypatch.setattr(parallel_read, "run_read_task", interrupt_second_task)
    with pytest.raises(KeyboardInterrupt):
        read_in_tasks(stage, tmp_path)
    outcome = read_in_tasks(stage, tmp_path)
    assert started == ["000000", "000001", "000001", "000002"]
    assert outcome == read_sequentially(stage, tmp_path)


def test_unavailable_file_is_reported_by_the_actor(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    stage = dataset("a.jsonl")
    missing = dataclasses.replace(local_file(tmp_path / "a.jsonl", tmp_path), path=str(tmp_path / "b.jsonl"))
    results = SourceReader(stage)({"task": [pickle.dumps(missing)], "out": [str(tmp_path / "task")]})
    assert results["rows"] == [0]
    assert "No such file" in results["failed"][0]
    assert not (tmp_path / "task").exists()


def test_line_numbers_count_from_the_start_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_read, "RANGE_BYTES", 16)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\nbad\n{"text": "three"}')
    stage = dataset("a.jsonl")
    quarantined: list[Quarantined] = []
    duplicates = DuplicateCount(tmp_path / "ids")
    assert read_in_parallel(context(stage, tmp_path), stage, quarantined.append, ReadCounts(), duplicates) == 3
    assert [row["line"] for row in read_rows(tmp_path / "out")] == [1, 3, 5]
    assert [line.line for line in quarantined] == [4]


def test_failed_task_raises_unavailable_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    stage = dataset("a.jsonl")

    def fail(*_: Any) -> int:
        raise UnavailableFile("`a.jsonl`: no network")

    monkeypatch.setattr(parallel_read, "run_read_task", fail)
    with pytest.raises(UnavailableFile, match="no network"):
        read_in_tasks(stage, tmp_path)
