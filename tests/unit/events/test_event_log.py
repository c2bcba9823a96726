"""The event log: events of one process are read completely and in order by another one."""

from __future__ import annotations

import errno
import math
import os
import time
from pathlib import Path

import pytest

from tunery.events import event_log
from tunery.events.event_log import EventLog, EventReader, read_events


def test_partial_line_is_skipped_and_the_next_event_is_read(tmp_path: Path) -> None:
    path = tmp_path / "driver.jsonl"
    EventLog(path).write("run_started", run="a")
    with path.open("a") as file:
        file.write('{"t": 1.0, "event": "progr')  # the writer was killed here
    EventLog(path).write("run_finished", state="done")
    assert [event["event"] for event in read_events(tmp_path)] == ["run_started", "run_finished"]


def test_line_truncated_by_a_full_disk_does_not_corrupt_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, write, writable_bytes = EventLog(tmp_path / "driver.jsonl"), os.write, [10]

    def until_full(descriptor: int, data: bytes) -> int:
        if not writable_bytes:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[: writable_bytes.pop()])

    monkeypatch.setattr(os, "write", until_full)
    with pytest.raises(OSError, match="No space left"):
        log.write("run_started", run="a")
    monkeypatch.setattr(os, "write", write)
    log.write("run_finished", state="failed")
    assert [event["event"] for event in read_events(tmp_path)] == ["run_finished"]


def test_log_is_synced_periodically_and_not_at_every_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    monkeypatch.setattr(event_log, "SYNC_SECONDS", 0.05)
    log, end = EventLog(tmp_path / "driver.jsonl"), time.monotonic() + 0.3
    while time.monotonic() < end:
        log.write("progress", done=1)
    assert 1 <= len(synced) <= 6


def test_incomplete_line_is_read_once_it_is_complete(tmp_path: Path) -> None:
    path, reader = tmp_path / "driver.jsonl", EventReader(tmp_path)
    line = '{"t": 1.0, "event": "progress", "done": 3}\n'
    path.write_text(line[:15])
    assert reader.new() == []
    path.write_text(line)
    assert [event["done"] for event in reader.new()] == [3]
    assert reader.new() == []


def test_two_writers_are_merged_by_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"t": 1, "event": "x"}\n{"t": 4, "event": "x"}\n')
    (tmp_path / "b.jsonl").write_text('{"t": 2, "event": "x"}\n{"t": 3, "event": "x"}\n')
    assert [event["t"] for event in read_events(tmp_path)] == [1, 2, 3, 4]


def test_stage_writer_adds_stage_and_trial_to_events(tmp_path: Path) -> None:
    EventLog(tmp_path / "t1-sft.jsonl", stage="sft", trial="t1").write("metrics", step=1, values={"loss": math.nan})
    (event,) = read_events(tmp_path)
    assert (event["stage"], event["trial"]) == ("sft", "t1")
    assert math.isnan(event["values"]["loss"])


def test_line_that_is_not_an_event_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('[1, 2]\n{"event": "x"}\n\n{"t": 2, "event": "x"}\n')
    assert len(read_events(tmp_path)) == 1


def test_run_without_events_reads_as_empty(tmp_path: Path) -> None:
    assert read_events(tmp_path / "nowhere") == []
