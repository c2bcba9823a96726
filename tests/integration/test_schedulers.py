"""Searches whose schedulers stop and pause trials, and two searches at the same time."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from run_here import RunsHere
from workspace import ENVIRONMENT, Workspace, facts, wait_for

RATES = [3e-3, 1e-3, 8e-4, 6e-4, 4e-4, 1e-6, 2e-6, 3e-6, 4e-6]
"""The first five learn something, the others almost nothing, so the median is among those that learn in any order."""


def packed(experiment: dict[str, Any]) -> None:
    experiment["stages"]["sft"] |= {"tuner": {"lora": {"rank": 4}}, "epochs": 4, "num_evals": 9}
    experiment["stages"].pop("eval")
    experiment["compute"] |= {"max_packed_trials": 4}
    experiment["search"] = {
        "metric": "sft.eval_loss",
        "mode": "min",
        "trials": len(RATES),
        "progress_unit": "steps",
        "initial_points": [{"sft.learning_rate": rate} for rate in RATES],
        "space": {"sft.learning_rate": {"loguniform": [1e-6, 1e-2]}},
    }


def states(bench: Workspace) -> dict[float, str]:
    (search,) = bench.artifacts("search")
    return {trial["overrides"]["sft.learning_rate"]: trial["state"] for trial in facts(search)["trials"]}


@pytest.mark.parametrize(("scheduler", "killed"), [("hyperband", True), ("median", False)])
def test_worse_trials_are_stopped_and_the_best_completes(
    before_sft: Workspace, runs_here: RunsHere, scheduler: str, killed: bool
) -> None:
    def change(experiment: dict[str, Any]) -> None:
        packed(experiment)
        experiment["search"]["scheduler"] = scheduler

    before_sft.write(change)
    if killed:
        first = before_sft.start()
        started = lambda: len([*(before_sft.store / "work").glob("sft-*/checkpoints/*/whole")]) > 3  # noqa: E731
        wait_for(started, process=first)
        os.killpg(first.pid, signal.SIGKILL)
        first.wait()
    done = runs_here.tunery(before_sft, "run", str(before_sft.file))
    assert done.returncode == 0, done.stdout + done.stderr
    actual = states(before_sft)
    assert actual.keys() == set(RATES)
    assert actual[3e-3] == "done"
    assert Counter(actual.values())["stopped"] >= 3
    assert set(actual.values()) == {"done", "stopped"}
    (search,) = before_sft.artifacts("search")
    assert facts(search)["best"]["overrides"] == {"sft.learning_rate": 3e-3}
    assert not [*(before_sft.store / "work").glob("sft-*")], "checkpoints were left behind"


@pytest.fixture
def cluster() -> Iterator[dict[str, str]]:
    """Environment variables for a Ray cluster with two CPUs and token authentication."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    access = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # A separate folder, so that `auto` does not find the cluster, with a short path for its sockets.
    folder = tempfile.mkdtemp(prefix="ray-")
    words = [
        f"--temp-dir={folder}",
        "--head",
        "--block",
        "--num-cpus=2",
        f"--port={port}",
        "--node-ip-address=127.0.0.1",
    ]
    words += ["--include-dashboard=false", "--object-store-memory=300000000", "--disable-usage-stats"]
    ray = subprocess.Popen(
        [str(Path(sys.executable).parent / "ray"), "start", *words],
        env={**ENVIRONMENT, **access},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(answers, 60)
        yield {**access, "RAY_ADDRESS": f"127.0.0.1:{port}"}
    finally:
        os.killpg(ray.pid, signal.SIGKILL)
        ray.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_two_searches_share_a_store_and_a_cluster(before_sft: Workspace, cluster: dict[str, str]) -> None:
    """Both start with unscored rows: each row is scored once, and the trial that both have is trained once."""
    for kind in ("score", "select"):
        for item in before_sft.artifacts(kind):
            shutil.rmtree(item)
    files = {}
    for name, rates in {"one": [1e-3, 2e-3, 3e-3], "two": [3e-3, 4e-3, 5e-3]}.items():

        def change(experiment: dict[str, Any], name: str = name, rates: list[float] = rates) -> None:
            packed(experiment)
            experiment["name"] = name
            experiment["stages"]["sft"] |= {"epochs": 1, "num_evals": 2}
            experiment["search"] |= {"trials": 3, "algorithm": "grid", "initial_points": []}
            experiment["search"]["space"] = {"sft.learning_rate": {"choice": rates}}

        files[name] = before_sft.write(change).rename(before_sft.folder / f"{name}.yaml")
    runs = {
        name: subprocess.Popen(
            before_sft.command("run", str(file), "--store", str(before_sft.store)),
            env={**ENVIRONMENT, **cluster},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=before_sft.folder,
        )
        for name, file in files.items()
    }
    for name, run in runs.items():
        output, _ = run.communicate(timeout=400)
        assert run.returncode == 0, f"{name}: {output}"
    assert len(before_sft.artifacts("score")) == len(before_sft.artifacts("select")) == 1
    searches = [facts(path) for path in before_sft.artifacts("search")]
    assert sorted(
        sorted(trial["overrides"]["sft.learning_rate"] for trial in entry["trials"]) for entry in searches
    ) == [
        [1e-3, 2e-3, 3e-3],
        [3e-3, 4e-3, 5e-3],
    ]
    assert all(trial["state"] == "done" for entry in searches for trial in entry["trials"])
    # 5 learning rates: one is in both searches, and that of the file is among them.
    assert len(before_sft.artifacts("sft")) == 5
    assert not [*(before_sft.store / "work").glob("*")]
