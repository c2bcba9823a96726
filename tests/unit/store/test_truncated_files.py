"""Files that a run reads when it resumes: one that was truncated by a power failure or a full disk counts as absent."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from tunery.evaluation.generate_responses import is_complete
from tunery.ingest import parallel_read
from tunery.ingest.filesystem import local_file
from tunery.ingest.parallel_read import run_read_task
from tunery.scoring.score_shard import Scored, ScorePass, score_shard, scored_rows
from tunery.search.journal import Journal, TrialStart
from tunery.spec import Dataset
from tunery.store import Artifact, Store, new_output_dir
from tunery.store.atomic_write import publish_folder, read_json, replace_file, temporary_name, write_json, write_text
from tunery.store.rows import row_id, shards, write_rows
from tunery.store.score_cache import ScoreCache
from tunery.training.checkpoints import (
    COMPLETE,
    HISTORY,
    hardlink_copy,
    last_checkpoint,
    mark_complete,
    remove_incompatible,
    write_history,
)


def truncations(path: Path, keep: int = 0, step: int = 1) -> Iterator[int]:
    """Truncate a file to every length from `keep` bytes to all but one, in steps, and always to the last 16 of them.
    Yields the length; the content is restored at the end."""
    content = path.read_bytes()
    size = len(content)
    for length in sorted({*range(keep, size, step), *range(max(keep, size - 16), size)}):
        path.write_bytes(content[:length])
        yield length
    path.write_bytes(content)


def zeroed(path: Path) -> None:
    """Replace the content by zeros, as some file systems do after a power failure."""
    path.write_bytes(b"\0" * path.stat().st_size)


# Atomic writes.


def test_write_replaces_a_file_completely_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [float("inf")]})
    assert path.read_text() == '{\n "a": [\n  Infinity\n ],\n "b": 1\n}\n'
    write_json(path, {})
    assert read_json(path) == {}
    assert os.listdir(tmp_path) == ["a.json"]


def test_failed_write_keeps_the_former_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "former")
    with pytest.raises(FileNotFoundError), replace_file(path) as temporary:
        temporary.with_name("absent").read_text()
    assert path.read_text() == "former"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_temporary_names_are_hidden_unique_and_keep_the_ending(tmp_path: Path) -> None:
    names = {temporary_name(tmp_path / "table.parquet").name for _ in range(100)}
    assert len(names) == 100
    assert all(name.startswith(".table.") and name.endswith(".parquet") for name in names)


def test_folder_is_not_published_over_another_one(tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    publish_folder(tmp_path / "first", tmp_path / "final")
    with pytest.raises(OSError, match="not empty"):
        publish_folder(tmp_path / "second", tmp_path / "final")
    assert (tmp_path / "final" / "file").read_text() == "first"


def test_process_killed_at_any_time_leaves_the_former_or_the_new_content(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"number": -1})
    for delay in range(20):
        child = os.fork()
        if child == 0:
            number = 0
            while True:
                write_json(path, {"number": number, "filler": "x" * 100_000})
                number += 1
        time.sleep(0.002 * delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        value = read_json(path)
        assert value is not None
        assert value["number"] == -1 or len(value["filler"]) == 100_000


# Artifacts.


def commit(store: Store, content: str = "rows") -> Artifact:
    manifest = {"kind": "dataset", "fingerprint": "0123", "identity": {}, "inputs": {}, "facts": {"rows": 3}}
    with store.lease("dataset", "0123") as lease:
        out = new_output_dir(store.staging_dir("dataset", "0123"), lease)
        (out / "rows.txt").write_text(content)
        return store.commit(out, manifest, {"seconds": 1.5}, lease)


@pytest.mark.parametrize("name", ["manifest.json", "runtime_stats.json"])
def test_artifact_with_a_truncated_file_is_absent_and_can_be_built_again(name: str, tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = commit(store).path / name
    for length in truncations(path):
        found = store.find("dataset", "0123")
        assert found is None or length == path.stat().st_size == len(path.read_bytes().rstrip()), length
    zeroed(path)
    assert store.find("dataset", "0123") is None
    assert (commit(store, "new").path / "rows.txt").read_text() == "new"


# Score cache.


def scores_table(ids: Any) -> pa.Table:
    return pa.table({"id": np.array(ids, np.uint64), "score": np.array(ids, float)})


def test_scores_in_a_truncated_file_are_not_cached_and_can_be_added_again(tmp_path: Path) -> None:
    ids = np.arange(1, 9, dtype=np.uint64)
    cache = ScoreCache(tmp_path)
    cache.add("other", [scores_table(ids[:2])], 2)
    cache.add("run", [scores_table(ids[2:])], 6)
    (file,) = (tmp_path / "run").iterdir()
    for _ in truncations(file, step=5):
        reset(cache)
        is_cached, scores = cache.find(ids)
        assert is_cached.tolist() == [True] * 2 + [False] * 6
        assert scores is not None
        assert scores["score"].to_pylist() == [1.0, 2.0]
    zeroed(file)
    reset(cache)
    assert cache.find(ids)[0].sum() == 2
    cache.add("run", [scores_table(ids[2:])], 6)
    assert cache.find(ids)[0].all()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "run"]


def reset(cache: ScoreCache) -> None:
    """Forget the mapped files, as a new process."""
    from tunery.store import score_cache

    score_cache._forget()


# Shards of a score stage.


def score(rows: Any, scores: Any) -> Scored:
    if any(row["text"] == "bad" for row in rows):
        raise ValueError("cannot be scored")
    return {name: {"score": [float(len(row["text"])) for row in rows]} for name in scores}


@pytest.fixture
def score_pass(tmp_path: Path) -> ScorePass:
    (tmp_path / "out").mkdir()
    rows = [{"text": text, "source": "rows.jsonl", "line": 1} for text in ("a", "bad", "ccc")]
    write_rows([{**row, "id": row_id(row)} for row in rows], tmp_path / "data")
    return ScorePass(("a",), tmp_path / "out", "1")


@pytest.mark.parametrize("name", ["part-00000.parquet", "part-00000.failed.json"])
def test_truncated_result_of_a_shard_is_scored_again(name: str, score_pass: ScorePass, tmp_path: Path) -> None:
    (shard,) = shards(tmp_path / "data")
    assert scored_rows(score_pass, shard) is None
    score_shard(shard, score_pass, score)
    assert scored_rows(score_pass, shard) == 3
    path = score_pass.folder / name
    complete = path.read_bytes()
    for _ in truncations(path, step=7):
        assert scored_rows(score_pass, shard) is None
    path.write_bytes(complete[:-1])
    score_shard(shard, score_pass, score)
    assert scored_rows(score_pass, shard) == 3
    assert path.read_bytes() == complete
    assert not list(score_pass.folder.glob(".*"))


def test_truncated_journal_of_a_shard_counts_only_complete_lines(score_pass: ScorePass, tmp_path: Path) -> None:
    (shard,) = shards(tmp_path / "data")
    journal = score_pass.folder / f"{shard.stem}.journal"
    journal.write_text("begin 1 0\none by one\nrow 0\nbegin 1 1\none by one\nrow 12\n")
    for _ in truncations(journal):
        content = journal.read_bytes()
        counts = score_shard(shard, score_pass, score, crashes=2)
        assert counts["failed"] in (1, 2), "the row without a score, and row 0 if it crashed its worker"
        assert not journal.exists()
        journal.write_bytes(content)


# Tasks of reading and of generating responses.


def test_truncated_result_of_a_read_task_is_read_again(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\nno json\n{"text": "b"}\n')
    stage, task = Dataset(kind="dataset", source="rows.jsonl"), local_file(tmp_path / "rows.jsonl", tmp_path)
    out = tmp_path / "task"
    run_read_task(task, stage, out)
    complete = {path.name: path.read_bytes() for path in out.iterdir()}
    assert sorted(complete) == ["counts.json", "ids.npy", "quarantine.jsonl", "rows.arrow", "sizes.npy"]
    assert parallel_read._is_complete(out)
    for name, content in complete.items():
        size = len(content)
        for length in {*range(0, size, 7), *range(size - 16, size)}:
            (out / name).write_bytes(content[:length])
            assert not parallel_read._is_complete(out), (name, length)
            assert not out.exists(), "removed"
            run_read_task(task, stage, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == complete


def test_file_of_responses_is_complete_with_all_its_lines_only(tmp_path: Path) -> None:
    file = tmp_path / "0-0.jsonl"
    assert not is_complete(file)
    lines = [{"read": 4, "too_long": 1, "unusable": 1}, *({"row": row, "response": "yes"} for row in range(2))]
    write_text(file, "".join(json.dumps(line) + "\n" for line in lines))
    assert is_complete(file)
    for length in truncations(file):
        assert not is_complete(file) or length == len(file.read_bytes().rstrip()), length
    zeroed(file)
    assert not is_complete(file)


# Checkpoints.


def checkpoint(folder: Path, step: int) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "ppo.json").write_text('{"state": {"step": 4}}')
    (path / "weights.bin").write_bytes(b"weights")
    write_history(path, [{"step": 1.0, "loss": 2.5}, {"step": 2.0, "loss": 2.25}])
    return path


@pytest.mark.parametrize("name", [COMPLETE, HISTORY, "ppo.json"])
def test_checkpoint_with_a_truncated_file_is_incomplete(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 4)
    assert last_checkpoint(tmp_path, "one") is None, "not marked yet"
    mark_complete(tmp_path, 4, "one")
    assert last_checkpoint(tmp_path, "one") == path
    content = (path / name).read_bytes()
    for length in truncations(path / name):
        ends_with_a_line = name == HISTORY and content[:length].endswith(b"\n")
        assert last_checkpoint(tmp_path, "one") is None or ends_with_a_line, length
    (path / name).write_bytes(content[:-1])
    remove_incompatible(tmp_path, "one")
    assert not path.exists()


def test_training_resumes_from_the_last_complete_checkpoint(tmp_path: Path) -> None:
    first = checkpoint(tmp_path, 4)
    mark_complete(tmp_path, 4, "one")
    second = checkpoint(tmp_path, 8)
    (second / COMPLETE).write_text("on")
    assert last_checkpoint(tmp_path, "one") == first


def test_copy_of_a_checkpoint_replaces_what_an_interrupted_copy_has_left(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "a", 4)
    mark_complete(tmp_path / "a", 4, "one")
    (tmp_path / "b" / temporary_name(path).name).mkdir(parents=True)
    hardlink_copy(path, tmp_path / "b")
    assert os.listdir(tmp_path / "b") == ["checkpoint-4"]
    assert last_checkpoint(tmp_path / "b", "one") == tmp_path / "b" / "checkpoint-4"


# Journal of a search.


def test_truncated_journal_of_a_search_has_its_complete_lines_and_can_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    for number, trial in enumerate(("a", "b")):
        journal.begin(TrialStart(trial, number, {"sft.epochs": number}, "sampled"))
        journal.report(trial, {"sft.eval_loss": 1.5})
        journal.end(trial, state="done", values={"sft.eval_loss": 1.25})
    journal.add_elapsed(3.0)
    complete = path.read_bytes()
    for length in range(len(complete)):
        path.write_bytes(complete[:length])
        lines = complete[:length].count(b"\n")
        resumed = Journal(path)
        assert len(resumed.records) == (lines + 2) // 3, length
        assert len(resumed.ended_records) == lines // 3, length
        resumed.begin(TrialStart("c", 2, {}, "sampled"))
        assert "c" in Journal(path).records
