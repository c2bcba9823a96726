"""Fixtures of the small experiment (tests/support/workspace.py), which is run once for all tests."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_here import RunsHere
from workspace import Workspace

from tunery.spec import Compute

# Two pytest processes share the cores (Makefile), each with several processes: more threads would wait for each other.
os.environ["OMP_NUM_THREADS"] = "1"

LONGEST = ("search", "population", "schedulers", "resume", "ppo", "workers", "scoring_faults", "submit", "divergence")
"""Modules of tests that take longest. They start first, so that no process runs one alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def order(item: pytest.Item) -> int:
        name = item.path.stem.removeprefix("test_")
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items.sort(key=order)


@pytest.fixture(scope="session")
def complete_run(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The small experiment after a complete, undisturbed run. Tests must not modify it."""
    bench = Workspace(tmp_path_factory.mktemp("made"))
    bench.write()
    done = bench.tunery("run", str(bench.file))
    assert done.returncode == 0, done.stdout + done.stderr
    (bench.folder / "output.txt").write_text(done.stdout)
    return bench


@pytest.fixture
def before_sft(complete_run: Workspace, tmp_path: Path) -> Workspace:
    """A new workspace whose store has all artifacts of the small experiment except those of sft and eval."""
    bench = Workspace(tmp_path)
    bench.write()
    for artifact in (complete_run.store / "artifacts").iterdir():
        if not artifact.name.startswith(("sft-", "evaluate-")):
            shutil.copytree(artifact, bench.store / "artifacts" / artifact.name)
    return bench


@pytest.fixture(scope="session")
def runs_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunsHere]:
    """Ray with two CPUs, and two workers that all tests share."""
    runs = RunsHere(Compute(workers=2, device="cpu", save_steps=10, max_failures=0), tmp_path_factory.mktemp("ray"))
    try:
        yield runs
    finally:
        runs.session.shut_down()
