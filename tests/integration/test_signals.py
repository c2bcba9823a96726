"""SIGINT and SIGTERM at any time of a run: exit code 130, a report, W&B closed, and the run can be resumed.

All runs share a store, so each one only has to do the work between the previous signal and its own.
TUNERY_ALL_MOMENTS=1 tests all times; the default ones can fail independently: Ray's start, Ray Data, Ray Train, the
end.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable

import pytest
from workspace import Workspace, facts, wait_for

EXPERIMENT = """
name: small
seed: 17
stages:
  texts:  {kind: dataset, source: "builtin:python-docs", subset: texts, split: train, limit: 60}
  scored: {kind: score, data: texts, by: [{length: words}]}
  base:   {kind: pretrain, data: texts, model: {scratch: tiny}, epochs: 6, learning_rate: 2.0e-3, global_batch_size: 4,
           max_length: 128}
  eval:   {kind: evaluate, models: [base], data: {texts: texts}}
compute: {workers: 1, save_steps: 5}
"""
SEARCH = """
search: {metric: base.eval_loss, mode: min, trials: 3, space: {base.learning_rate: {loguniform: [5.0e-4, 5.0e-3]}}}
"""
all_moments = pytest.mark.skipif("TUNERY_ALL_MOMENTS" not in os.environ, reason="runs with TUNERY_ALL_MOMENTS=1")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    bench = Workspace(tmp_path_factory.mktemp("signals"))
    bench.file.write_text(EXPERIMENT)
    return bench


class Log:
    """Events of the last run."""

    def __init__(self, bench: Workspace) -> None:
        self._bench = bench
        self.since = time.time()

    def has(self, event: str, **values: object) -> bool:
        wanted = {"event": event, **values}
        return any(wanted.items() <= entry.items() for entry in self._bench.events() if entry["t"] >= self.since)

    def last_state(self) -> str:
        return [entry for entry in self._bench.events() if entry["event"] == "run_finished"][-1]["state"]


def checkpoint(bench: Workspace, since: float) -> bool:
    """Whether there is a checkpoint written after `since`."""
    whole = bench.store.glob("work/pretrain-*/checkpoints/checkpoint-*/whole")
    return any(path.stat().st_mtime >= since for path in whole)


def report_is_new(bench: Workspace, since: float) -> bool:
    path = bench.run / "report.html"
    return path.is_file() and path.stat().st_mtime >= since


def left_of(bench: Workspace, group: int) -> list[str]:
    """Return the pids of the processes of the run's process group and its Ray cluster that are still alive."""
    link = bench.run / "logs" / "ray"  # not there before Ray has started
    patterns = [("-g", str(group)), *([("-f", link.resolve().parent.name)] if link.is_symlink() else ())]
    actual = [
        subprocess.run(["pgrep", *words], capture_output=True, text=True, check=False).stdout.split()
        for words in patterns
    ]
    return [pid for pids in actual for pid in pids]


Moment = Callable[[Workspace, Log], bool]
MOMENTS: dict[str, Moment] = {
    "start": lambda bench, log: log.has("run_started"),
    "ray started": lambda bench, log: log.has("ray_started"),
    "scoring": lambda bench, log: log.has("stage_started", stage="scored"),
    "scoring goes on": lambda bench, log: log.has("progress", stage="scored"),
    "scored": lambda bench, log: log.has("stage_finished", stage="scored"),
    "workers start": lambda bench, log: log.has("stage_started", stage="base"),
    "loading": lambda bench, log: log.has("progress", stage="base"),
    "checkpoint": lambda bench, log: checkpoint(bench, log.since),
    "evaluating": lambda bench, log: log.has("stage_started", stage="eval"),
    "end": lambda bench, log: log.has("run_finished", state="done"),
    "report is there": lambda bench, log: report_is_new(bench, log.since),
}


@pytest.mark.parametrize(
    ("moment", "number", "how"),
    [
        ("start", signal.SIGTERM, "process"),
        pytest.param("start", signal.SIGINT, "group", marks=all_moments),
        pytest.param("start", signal.SIGTERM, "ignored", marks=all_moments),
        pytest.param("ray started", signal.SIGTERM, "process", marks=all_moments),
        ("scoring", signal.SIGTERM, "group"),
        pytest.param("scoring goes on", signal.SIGINT, "process", marks=all_moments),
        pytest.param("scored", signal.SIGTERM, "twice", marks=all_moments),
        pytest.param("workers start", signal.SIGINT, "twice", marks=all_moments),
        pytest.param("loading", signal.SIGTERM, "process", marks=all_moments),
        pytest.param("checkpoint", signal.SIGINT, "ignored", marks=all_moments),
        ("checkpoint", signal.SIGTERM, "group"),
        pytest.param("evaluating", signal.SIGTERM, "process", marks=all_moments),
        pytest.param("end", signal.SIGTERM, "twice", marks=all_moments),
        pytest.param("report is there", signal.SIGTERM, "process", marks=all_moments),
        pytest.param("report is there", signal.SIGINT, "group", marks=all_moments),
    ],
)
def test_signal_stops_cleanly(bench: Workspace, moment: str, number: signal.Signals, how: str) -> None:
    log = Log(bench)
    out, err = stopped(bench, lambda: MOMENTS[moment](bench, log), number, how)
    assert "the same command" in err
    assert "Traceback" not in out + err
    assert "was killed" not in err
    assert report_is_new(bench, log.since)
    assert "W&B (offline): wandb sync" in out
    assert "W&B: " not in out, "W&B was not closed"
    assert log.last_state() == ("done" if moment in ("end", "report is there") else "interrupted")


def stopped(bench: Workspace, happened: Callable[[], bool], number: signal.Signals, how: str) -> tuple[str, str]:
    """Send the signal to a run when `happened` is true. Returns its output after checking that it exits with 130 and
    leaves no process."""
    run = start(bench, sigint_ignored=how == "ignored")
    try:
        wait_for(happened, seconds=300, process=run)
        if how == "group":
            os.killpg(run.pid, number)
        else:
            os.kill(run.pid, number)
        if how == "twice":
            time.sleep(0.3)
            os.kill(run.pid, number)
        out, err = run.communicate(timeout=60)
        assert run.returncode == 130, out + err
        wait_for(lambda: not left_of(bench, run.pid), seconds=30)
        return out, err
    finally:
        run.kill()


def start(bench: Workspace, *, sigint_ignored: bool) -> subprocess.Popen[str]:
    """Start a run in its own process group. A shell without job control starts background processes with SIGINT
    ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN) if sigint_ignored else None
    try:
        return bench.start()
    finally:
        if before is not None:
            signal.signal(signal.SIGINT, before)


def test_run_resumes_after_all_signals(bench: Workspace) -> None:
    done = bench.tunery("run", str(bench.file), "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["run"] == "small"
    assert bench.artifacts("evaluate")


@all_moments
@pytest.mark.parametrize(
    ("event", "number", "how"),
    [
        ("search_started", signal.SIGTERM, "process"),
        ("trial_started", signal.SIGINT, "process"),
        ("metrics", signal.SIGTERM, "group"),
        ("trial_finished", signal.SIGINT, "twice"),
    ],
)
def test_signal_during_a_search_stops_cleanly(
    searching: Workspace, event: str, number: signal.Signals, how: str
) -> None:
    log = Log(searching)
    out, err = stopped(searching, lambda: log.has(event), number, how)
    assert "the same command" in err
    assert "Traceback" not in out + err
    assert report_is_new(searching, log.since)
    assert log.last_state() == "interrupted"


@all_moments
def test_search_resumes_after_all_signals(searching: Workspace) -> None:
    done = searching.tunery("run", str(searching.file), "--json")
    assert done.returncode == 0, done.stderr
    (search,) = searching.artifacts("search")
    assert len(facts(search)["trials"]) == 3


@pytest.fixture(scope="module")
def searching(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    bench = Workspace(tmp_path_factory.mktemp("searching"))
    bench.file.write_text(EXPERIMENT.replace("max_length: 128}", "max_length: 128, eval_data: texts}") + SEARCH)
    return bench
