"""The end of a run on a full disk: the first error is reported, without a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import tunery
from tunery.events.event_log import EventLog, read_events

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tunery.__file__).parents[1])}
CODE = """
import os, resource, sys
from pathlib import Path
from tunery import cli
run = Path("store/runs/r")
run.mkdir(parents=True)
exec(sys.argv[1])
sys.argv = ["tunery", "run", "e.yaml", "--store", "store"]
cli.main()
"""
FAIL_REPORT = '(run / "report.html").mkdir()'
FAIL_WANDB = '(run / "wandb").write_text("a file where W&B wants a folder")'
FAIL_ALL_WRITES = "resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    return tmp_path


def run(folder: Path, before: str, *, fails: bool, wandb: bool = False, **popen: object) -> subprocess.CompletedProcess:
    """Run an experiment with one stage, which fails if `fails`: the split `test` of the two rows is empty."""
    split = "test" if fails else "train"
    (folder / "e.yaml").write_text(
        f"name: r\nseed: 1\nstages:\n  rows: {{kind: dataset, source: rows.jsonl, split: {split}}}\n"
        f"tracking: {{wandb: {{mode: {'offline' if wandb else 'disabled'}}}}}\n"
    )
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": ENVIRONMENT, **popen}
    return subprocess.run(
        [sys.executable, "-c", CODE, before], cwd=folder, text=True, timeout=60, check=False, **streams
    )


def test_error_of_a_stage_is_shown_when_the_report_cannot_be_written(folder: Path) -> None:
    process = run(folder, FAIL_REPORT, fails=True)
    assert process.returncode == 1
    assert process.stderr.startswith("error: stage rows: `rows.jsonl` has no valid row\n")
    assert "report: not written (Is a directory)" in process.stdout
    assert "Traceback" not in process.stdout + process.stderr
    assert "Traceback" in (folder / "store/runs/r/logs/driver.log").read_text(), "the log has the traceback"


def test_run_whose_report_cannot_be_written_fails_with_a_remedy(folder: Path) -> None:
    process = run(folder, FAIL_REPORT, fails=False)
    assert process.returncode == 1
    assert process.stderr.splitlines()[:2] == [
        "error: the run is done, but its report could not be written",
        "cause: Is a directory",
    ]
    assert "tunery report" in process.stderr
    assert "Traceback" not in process.stdout + process.stderr


def test_error_of_a_stage_is_shown_when_wandb_fails(folder: Path) -> None:
    process = run(folder, FAIL_WANDB, fails=True, wandb=True)
    assert process.returncode == 1
    assert process.stderr.startswith("error: stage rows: `rows.jsonl` has no valid row\n")
    assert "W&B: " in process.stdout
    assert "Traceback" not in process.stdout + process.stderr


def test_run_on_a_full_disk_ends_without_a_traceback(folder: Path) -> None:
    process = run(folder, FAIL_ALL_WRITES, fails=False)
    assert process.returncode == 1
    assert process.stderr.startswith("error: ")
    assert "Traceback" not in process.stdout + process.stderr


@pytest.mark.parametrize("fails", [False, True])
def test_stdout_on_a_full_disk_does_not_change_the_run(folder: Path, fails: bool) -> None:
    with Path("/dev/full").open("w") as full:
        process = run(folder, "", fails=fails, stdout=full)
    assert process.returncode == (1 if fails else 0)
    assert process.stderr.startswith("error: stage rows: `rows.jsonl` has no valid row\n" if fails else "")
    assert "Traceback" not in process.stderr
    assert (folder / "store/runs/r/report.html").is_file()


def test_incomplete_event_is_an_error_and_does_not_affect_others(tmp_path: Path) -> None:
    """A write to a nearly full disk may succeed partially without an error."""
    code = """
import resource, sys
from pathlib import Path
from tunery.events.event_log import EventLog
log = EventLog(Path(sys.argv[1]))
log.write("first")
size = Path(sys.argv[1]).stat().st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, resource.RLIM_INFINITY))
for name in ("cut", "missing"):
    try:
        log.write(name)
    except OSError as error:
        print(name)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.write("last")
"""
    path = tmp_path / "events" / "driver.jsonl"
    process = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=20, check=False
    )
    assert process.stdout.split() == ["cut", "missing"], process.stderr
    assert [event["event"] for event in read_events(path.parent)] == ["first", "last"]
    EventLog(path).write("of a later run")
    assert [event["event"] for event in read_events(path.parent)] == ["first", "last", "of a later run"]
