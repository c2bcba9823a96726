"""A run that was killed, interrupted or failed resumes when it is rerun, and ends with identical files."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from processes import checkpoints, contents, worker_pids
from run_here import RunsHere
from workspace import Workspace, wait_for


def test_killed_in_the_middle_of_training_ends_with_the_same_bytes(
    complete_run: Workspace, before_sft: Workspace
) -> None:
    first = before_sft.start()
    wait_for(lambda: checkpoints(before_sft), process=first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    wait_for(lambda: not worker_pids(before_sft), seconds=60)
    assert checkpoints(before_sft)
    assert not before_sft.artifacts("sft")
    second = before_sft.tunery("run", str(before_sft.file))
    assert second.returncode == 0, second.stdout + second.stderr
    resumed = [
        e["facts"]["resumed_from"]
        for e in before_sft.events()
        if e["event"] == "stage_finished" and e["stage"] == "sft"
    ]
    assert resumed[0] >= 10, "it began again from nothing"
    assert contents(before_sft.only("sft")) == contents(complete_run.only("sft"))
    assert contents(before_sft.only("evaluate")) == contents(complete_run.only("evaluate"))


def test_ctrl_c_stops_cleanly_and_prints_how_to_resume(before_sft: Workspace) -> None:
    run = before_sft.start()
    wait_for(lambda: checkpoints(before_sft), process=run)
    run.send_signal(signal.SIGINT)
    out, err = run.communicate(timeout=60)
    assert run.returncode == 130, out + err
    assert "the same command resumes" in err
    assert "Traceback" not in out + err
    assert (before_sft.run / "report.html").is_file()
    wait_for(lambda: not worker_pids(before_sft), seconds=60)


def test_killed_worker_is_reported_and_finished_stages_are_kept(before_sft: Workspace) -> None:
    finished = {path.name for path in (before_sft.store / "artifacts").iterdir()}
    run = before_sft.start()
    wait_for(lambda: checkpoints(before_sft), process=run)
    os.kill(worker_pids(before_sft)[0], signal.SIGKILL)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 1, out + err
    assert "stage sft: a worker process was killed" in err
    assert "Traceback" not in out + err
    assert finished <= {path.name for path in (before_sft.store / "artifacts").iterdir()}
    assert checkpoints(before_sft), "the last checkpoint must stay"


def test_worker_out_of_memory_is_reported(before_sft: Workspace) -> None:
    """Ray's memory monitor kills the training worker, since the threshold is set to 1% of the memory."""
    done = before_sft.tunery(
        "run", str(before_sft.file), RAY_memory_usage_threshold="0.01", RAY_memory_monitor_refresh_ms="100"
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "out of memory" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.fixture
def small_disk(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("small")
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    for _ in range(20):
        if subprocess.run(["umount", "-l", str(folder)], capture_output=True, check=False).returncode == 0:
            break
        time.sleep(0.5)


def test_full_disk_is_reported_and_finished_stages_are_kept(
    before_sft: Workspace, small_disk: Path, runs_here: RunsHere
) -> None:
    shutil.copytree(before_sft.store, small_disk / "store")
    finished = {path.name for path in (small_disk / "store" / "artifacts").iterdir()}
    bench = Workspace(small_disk)
    shutil.copy(before_sft.file, bench.file)
    done = runs_here.tunery(bench, "run", str(bench.file))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the disk is full" in done.stderr, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert finished <= {path.name for path in (bench.store / "artifacts").iterdir()}
