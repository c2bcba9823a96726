"""After kills, interruptions and resumes, W&B's offline files have every point of the event log once and in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from wandb_server import wandb_server

from tunery.events.event_log import EventLog, read_events
from tunery.events.event_reducer import replay
from tunery.reporting.wandb_files import read_records, repair_files, run_files
from tunery.reporting.wandb_mirror import WandbMirror
from tunery.reporting.wandb_translate import run_id
from tunery.spec import Wandb

ROOT = Path(__file__).parents[2]
RUN, STAGE = run_id("small"), run_id("small", "sft", "", "f")
INVOCATION = """
import os, signal, sys, time
from pathlib import Path
from tunery.spec import Wandb
from tunery.spec import Wandb
from tunery.reporting import wandb_mirror
from tunery.events.event_log import EventLog
from tunery.reporting.wandb_mirror import WandbMirror

wandb_mirror.POLL_SECONDS, wandb_mirror.SETTLE_SECONDS, wandb_mirror.FLUSH_SECONDS = 0.1, 0.3, 0.2
folder, resumed, last, trials = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(",")

def interrupt(number, frame):
    raise KeyboardInterrupt

signal.signal(signal.SIGTERM, interrupt)
log = EventLog(folder / "events" / "driver.jsonl")
mirror = WandbMirror(Wandb(project="p", mode=os.environ.get("MODE", "offline")), "small", folder, {"name": "small"})
mirror.start()
log.write("run_started", run="small", stages=[])
try:
    for trial in trials:
        if trial:
            log.write("trial_started", trial=trial, overrides={"sft.epochs": 1})
        own = EventLog(folder / "events" / f"{trial or 'stage'}-sft-0.jsonl", stage="sft", trial=trial)
        own.write("stage_started", kind="sft", fingerprint="f")
        own.write("progress", done=0, total=200, unit="steps", detail="loading")
        for step in range(resumed + 1, last + 1):
            own.write("metrics", step=step, values={"loss": 1 / step, "rows": 4.0 * step})
            if step % 50 == 0:
                own.write("metrics", step=step, values={"eval_loss": 2 / step, "rows": 4.0 * step})
            if step == (resumed + last) // 2 and last != 200 and trial == trials[0]:
                print("half", flush=True)
                sys.stdin.readline()
        if last == 200:
            own.write("stage_finished", kind="sft", fingerprint="f", reused=False, seconds=1.0, facts={"loss": 0.005})
        if last == 200 and trial:
            log.write("trial_finished", trial=trial, overrides={"sft.epochs": 1}, state="done", value=0.01, seconds=1)
    print("told", flush=True)
    if last != 200 or "wait" in sys.argv:
        time.sleep(60)
    log.write("run_finished", state="done", seconds=1.0, message="")
except KeyboardInterrupt:
    log.write("run_finished", state="interrupted", seconds=1.0, message="")
finally:
    mirror.close()
"""


class Invocation:
    """An invocation of a command that trains the stage sft of each of `trials` ("": outside a search) from the
    checkpoint of step `resumed` to step `last`, and ends by itself after step 200.

    `told` makes it wait half way until W&B's file has the first half of the points, so that a kill afterwards finds the
    second half only in the event log.
    """

    def __init__(self, folder: Path, resumed: int, last: int, *trials: str, wait: bool = False, **more: str) -> None:
        self.folder, self.last, self.half = folder, last, (resumed + last) // 2
        words = [str(folder), str(resumed), str(last), ",".join(trials), *["wait"] * wait]
        self.process = subprocess.Popen(
            [sys.executable, "-c", INVOCATION, *words],
            env={**os.environ, "HOME": str(folder.parent), "PYTHONPATH": str(ROOT / "platform"), **more},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def told(self) -> Invocation:
        """Return when all points are in the event log."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        if self.last != 200:
            assert self.process.stdout.readline() == "half\n"
            deadline = time.time() + 60
            while not any(self.half in (row.get("step"), row.get("sft/step")) for row in rows(self.folder, "*")):
                assert time.time() < deadline, "W&B's file never got there"
                time.sleep(0.1)
            self.process.stdin.write("\n")
            self.process.stdin.flush()
        assert self.process.stdout.readline() == "told\n"
        return self

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.process.pid, number)
        self.process.wait(60)

    def kill_group(self, number: int = signal.SIGKILL) -> None:
        """Send the signal to the process group, which includes W&B's service process."""
        os.killpg(self.process.pid, number)
        self.process.wait(60)

    def end(self) -> None:
        assert self.process.wait(60) == 0


@pytest.fixture(autouse=True)
def _no_settings_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def rows(folder: Path, id: str = STAGE) -> list[dict[str, Any]]:
    """Return the history of a run from all its files, as `wandb sync` would upload it."""
    return [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for path in run_files(folder / "wandb", id)
        for record in read_records(path)
        if record.WhichOneof("record_type") == "history"
    ]


def check_complete(folder: Path, last: int, id: str = STAGE, prefix: str = "") -> None:
    check_rows(rows(folder, id), last, prefix)


def check_rows(found: list[dict[str, Any]], last: int, prefix: str = "") -> None:
    assert [row["_step"] for row in found] == [*range(len(found))]
    steps = defaultdict(list)
    for row in found:
        for name in row.keys() & {f"{prefix}loss", f"{prefix}eval_loss"}:
            steps[name].append(row[f"{prefix}step"])
            assert row[name] == {"loss": 1, "eval_loss": 2}[name.removeprefix(prefix)] / row[f"{prefix}step"]
            assert row[f"{prefix}rows"] == 4.0 * row[f"{prefix}step"]
    assert steps[f"{prefix}loss"] == [*range(1, last + 1)]
    assert steps[f"{prefix}eval_loss"] == [*range(50, last + 1, 50)]


def summary(path: Path) -> dict[str, Any]:
    """Return the summary of a file by wandb's own reader."""
    wandb = Path(sys.executable).parent / "wandb"
    done = subprocess.run([wandb, "leet", "inspect", "--summary", "--json", path], capture_output=True, text=True)
    result = json.loads(done.stdout)
    assert isinstance(result, dict)
    return result


def test_killed_at_step_100_and_resumed_from_step_100_has_every_point_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = Invocation(folder, 0, 100, "").told()
    first.kill_group()  # including W&B's service
    assert 50 <= len(rows(folder)) < 102, "the mirror is seconds behind the log"
    Invocation(folder, 100, 200, "").told().end()
    check_complete(folder, 200)
    whole = run_files(folder / "wandb", STAGE)[-1]
    assert (summary(whole)["state"], summary(whole)["summary"]["step"]) == ("finished", 200)


def test_resumed_twice_from_checkpoints_before_the_kill_has_every_point_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Invocation(folder, 0, 100, "").told().kill()
    Invocation(folder, 66, 150, "").told().kill()
    Invocation(folder, 130, 200, "").told().end()
    check_complete(folder, 200)


def test_interrupted_run_is_complete_before_and_after_resuming(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Invocation(folder, 0, 100, "").told().kill_group(signal.SIGTERM)  # as terminals and cluster schedulers do
    check_complete(folder, 100)
    Invocation(folder, 80, 200, "").told().end()
    check_complete(folder, 200)


def test_end_of_a_stage_lost_by_a_kill_is_sent_by_the_next_invocation(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Invocation(folder, 0, 200, "", wait=True).told().kill_group()
    assert len(rows(folder)) < 204
    log = EventLog(folder / "events" / "driver.jsonl")
    mirror = WandbMirror(Wandb(project="p", mode="offline"), "small", folder, {"name": "small"})
    mirror.start()
    log.write("run_started", run="small", stages=[])
    log.write("stage_finished", stage="sft", kind="sft", fingerprint="f", reused=True, seconds=0.0, facts={})
    log.write("run_finished", state="done", seconds=1.0, message="")
    assert mirror.close().lost == 0
    check_complete(folder, 200)
    last = summary(run_files(folder / "wandb", STAGE)[-1])
    assert (last["state"], last["summary"]["loss"]) == ("finished", 0.005)


def test_trials_of_a_killed_search_have_every_point_once(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Invocation(folder, 0, 100, "t0", "t1").told().kill_group()
    Invocation(folder, 66, 200, "t0", "t1").told().end()
    for trial in ("t0", "t1"):
        check_complete(folder, 200, run_id("small", "", trial, '{"sft.epochs": 1}'), "sft/")


def test_sync_uploads_the_files_of_a_killed_and_resumed_run_as_one_history(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Invocation(folder, 0, 100, "").told().kill_group()
    Invocation(folder, 66, 200, "").told().end()
    with wandb_server() as server:
        done = subprocess.run(
            [Path(sys.executable).parent / "wandb", "sync", folder / "wandb"],
            env={**os.environ, "HOME": str(tmp_path), **server.environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert "ERROR" not in done.stderr, done.stderr
        check_rows(server.history[STAGE], 200)


def test_online_run_that_is_killed_and_resumed_has_every_point_once_on_the_server(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with wandb_server() as server:
        online = {**server.environment, "MODE": "online"}
        Invocation(folder, 0, 100, "", **online).told().kill_group()
        assert len(server.history[STAGE]) < 102
        Invocation(folder, 66, 150, "", **online).told().kill_group()
        Invocation(folder, 130, 200, "", **online).told().end()
        check_rows(server.history[STAGE], 200)


def test_truncated_file_of_a_killed_run_does_not_block_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    Invocation(folder, 0, 100, "").told().kill_group()
    (path,) = run_files(folder / "wandb", STAGE)
    before = len(rows(folder))
    path.write_bytes(path.read_bytes()[:-3])
    empty = folder / "wandb" / "offline-run-20200101_000000-abc" / "run-abc.wandb"
    empty.parent.mkdir()
    empty.write_bytes(path.read_bytes()[:7])
    repair_files(folder / "wandb")
    assert not empty.parent.exists()
    assert len(rows(folder)) in (before, before - 1)
    Invocation(folder, 66, 200, "").told().end()
    check_complete(folder, 200)


def test_report_and_terminal_have_every_point_once_after_two_kills(tmp_path: Path) -> None:
    """Both are generated from the reduced event log (events/event_reducer.py)."""
    log = EventLog(tmp_path / "driver.jsonl")
    for resumed, last in ((0, 100), (66, 150), (130, 200)):
        log.write("run_started", run="small", stages=[{"name": "sft", "kind": "sft", "inputs": []}])
        log.write("stage_started", stage="sft", kind="sft", fingerprint="f")
        for step in range(resumed + 1, last + 1):
            log.write("metrics", stage="sft", step=step, values={"loss": 1 / step})
    curve = replay(read_events(tmp_path)).stages["sft"].curve
    assert [(point.step, point.values["loss"]) for point in curve] == [(step, 1 / step) for step in range(1, 201)]
