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

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from in_process import stage_context

from tunery.ingest import parallel_read
from tunery.ingest.filesystem import File, UnavailableFile, local_file
from tunery.ingest.parallel_read import ReadActor, read_in_parallel, read_tasks
from tunery.ingest.read import Quarantined, ReadCounts, as_tables, read_source
from tunery.ingest.sources import find_parts
from tunery.spec import Dataset
from tunery.store import StageContext
from tunery.store.rows import shards, write_tables

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


Told = tuple[list[bytes], list[Quarantined], ReadCounts]


def at_once(stage: Dataset, folder: Path) -> Told:
    bad: list[Quarantined] = []
    tally = ReadCounts()
    write_tables(as_tables(read_source(stage, folder, bad.append, tally), tally), folder / "one")
    return [path.read_bytes() for path in shards(folder / "one")], bad, tally


def in_units(stage: Dataset, folder: Path) -> Told:
    bad: list[Quarantined] = []
    tally = ReadCounts()
    shutil.rmtree(folder / "many", ignore_errors=True)
    write_tables(read_in_parallel(context(stage, folder), stage, bad.append, tally), folder / "many")
    return [path.read_bytes() for path in shards(folder / "many")], bad, tally


@given(
    st.lists(LINES, max_size=8), st.booleans(), st.booleans(), st.integers(3, 60), st.sampled_from(["jsonl", "text"])
)
@example([b'{"text": "a"}', b'{"text": "b"}'], True, False, 14, "jsonl")  # a span ends with a line
@example([b"", b"", b""], True, False, 1, "jsonl")
@settings(max_examples=20, derandomize=True)
def test_spans_of_a_file_give_what_the_file_gives(
    lines: list[bytes], ended: bool, marked: bool, span: int, form: str
) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as name:
        patch.setattr(parallel_read, "RANGE_BYTES", span)
        folder = Path(name)
        content = (b"\xef\xbb\xbf" if marked else b"") + b"\n".join(lines) + (b"\n" if ended else b"")
        (folder / "a").write_bytes(content)
        stage = dataset("a", format=form)
        assert len(read_tasks(find_parts(stage, folder), stage)) == max(1, -(-len(content) // span))
        assert in_units(stage, folder) == at_once(stage, folder)


def test_files_of_all_sorts_are_units_and_only_plain_lines_are_cut(
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
    units = read_tasks(find_parts(stage, tmp_path), stage)
    assert [unit.name for unit in units if isinstance(unit, File) and unit.span is None] == [
        "b.jsonl.gz",
        "c.json",
        "d.csv",
    ]
    assert len([unit for unit in units if unit.name == "a.jsonl"]) > 10
    found = in_units(stage, tmp_path)
    assert found == at_once(stage, tmp_path)
    assert found[2].other_splits
    assert not list((tmp_path / "work").iterdir())


def test_units_that_are_done_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_read, "RANGE_BYTES", 20)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n{"text": "three"}\n')
    stage = dataset("a.jsonl")
    read_unit = parallel_read.run_read_task
    asked: list[str] = []

    def dies(unit: Any, stage: Dataset, out: Path) -> int:
        asked.append(out.name)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return read_unit(unit, stage, out)

    monkeypatch.setattr(parallel_read, "run_read_task", dies)
    with pytest.raises(KeyboardInterrupt):
        in_units(stage, tmp_path)
    found = in_units(stage, tmp_path)
    assert asked == ["000000", "000001", "000001", "000002"]
    assert found == at_once(stage, tmp_path)


def test_file_out_of_reach_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    stage = dataset("a.jsonl")
    gone = dataclasses.replace(local_file(tmp_path / "a.jsonl", tmp_path), path=str(tmp_path / "b.jsonl"))
    told = ReadActor(stage)({"unit": [pickle.dumps(gone)], "out": [str(tmp_path / "unit")]})
    assert told["rows"] == [0]
    assert "No such file" in told["failed"][0]
    assert not (tmp_path / "unit").exists()


def test_lines_are_numbers_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_read, "RANGE_BYTES", 16)
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\nbad\n{"text": "three"}')
    stage = dataset("a.jsonl")
    bad: list[Quarantined] = []
    tables = list(read_in_parallel(context(stage, tmp_path), stage, bad.append, ReadCounts()))
    assert pa.concat_tables(tables)["line"].to_pylist() == [1, 3, 5]
    assert [line.line for line in bad] == [4]


def test_failure_of_a_unit_ends_the_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    stage = dataset("a.jsonl")

    def fails(*_: Any) -> int:
        raise UnavailableFile("`a.jsonl`: no network")

    monkeypatch.setattr(parallel_read, "run_read_task", fails)
    with pytest.raises(UnavailableFile, match="no network"):
        in_units(stage, tmp_path)
