"""Run experiments in the test process, on a Ray session and two workers that are started once per test process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from unittest.mock import patch

from ray._private import state
from workspace import Workspace

import tunery.live
from tunery import cli
from tunery.events.event_log import EventLog
from tunery.interrupt import STOP
from tunery.pipeline.compute import batch_sizes, resolve_compute
from tunery.pipeline.execute import execute
from tunery.pipeline.ray_session import RaySession
from tunery.pipeline.run_context import RunContext
from tunery.spec import Compute, load
from tunery.store import Artifact, Store
from tunery.training.launch import WorkersLauncher
from tunery.workers.cluster_resources import free_resources

RETURN_SECONDS = 60.0
"""Time limit for the CPUs of a run to be free again."""


class SharedSession(RaySession):
    """Ray and workers that runs use and leave running."""

    def stop(self) -> None:
        """Do nothing: `shut_down` stops Ray."""

    def shut_down(self) -> None:
        super().stop()

    def reserved_by_others(self) -> str:
        """Wait until the workers are the only ones that reserve CPUs; return a description of the actors if others
        still do after RETURN_SECONDS, else ""."""
        assert self.hardware is not None, "started by the fixture"
        deadline = time.monotonic() + RETURN_SECONDS
        while self.hardware.cpus > sum(node.cpus for node in free_resources()) + self.workers.reserved_cpus:
            if time.monotonic() > deadline:
                actors = [actor for actor in state.actors().values() if actor["State"] != "DEAD"]
                return "\n".join(f"{actor['ActorClassName']} (process {actor['Pid']})" for actor in actors)
            time.sleep(0.2)
        return ""


@dataclass
class RunsHere:
    compute: Compute
    """Two workers on the CPU."""
    logs: Path

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.session = SharedSession(EventLog(self.logs / "events.jsonl"), self.logs)
        self.session.start(self.compute)

    def execute(self, workspace: Workspace, **compute: Any) -> dict[str, Artifact]:
        """Run the stages of an experiment without a search on the workers; `compute` changes its compute settings."""
        experiment, _ = load(workspace.file)
        changed = experiment.compute.model_copy(update=compute)
        resolved, _ = resolve_compute(changed, self.session.hardware, batch_sizes(experiment))
        run_context = RunContext(Store(workspace.store), workspace.run, workspace.file)
        return execute(
            experiment.model_copy(update={"compute": resolved}),
            run_context,
            EventLog(run_context.events / "driver.jsonl"),
            lambda stage: WorkersLauncher(self.session.workers, resolved),
        )

    def tunery(self, bench: Workspace, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the CLI like `Workspace.tunery`, in this process: `tunery run` uses the running Ray. If it
        leaves CPUs reserved, start Ray again for the next test and fail."""
        command = ["tunery", *words, "--store", str(bench.store)]
        environment = {"WANDB_MODE": "offline", "COLUMNS": "120"}
        with (
            tempfile.TemporaryFile("w+", encoding="utf-8") as out,
            tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        ):
            with (
                patch.object(tunery.live, "RaySession", lambda log, logs: self.session),
                patch.object(sys, "argv", command),
                patch.dict(os.environ, environment),
                _working_directory(bench.folder),
                _redirected(out, err),
                STOP.handled(),
                STOP.held(),
            ):
                code = cli.run_command()
            if reserved := self.session.reserved_by_others():
                self.session.shut_down()
                self.start()
                raise AssertionError(f"the run left CPUs reserved; actors:\n{reserved}")
            return subprocess.CompletedProcess(command, code, _content(out), _content(err))


@contextmanager
def _working_directory(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextmanager
def _redirected(out: TextIO, err: TextIO) -> Iterator[None]:
    """Redirect the file descriptors and Python's objects of standard output and error, as for a separate process."""
    saved = os.dup(1), os.dup(2)
    try:
        with os.fdopen(os.dup(out.fileno()), "w") as stdout, os.fdopen(os.dup(err.fileno()), "w") as stderr:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            with patch.object(sys, "stdout", stdout), patch.object(sys, "stderr", stderr):
                yield
    finally:
        for number, copy in enumerate(saved, start=1):
            os.dup2(copy, number)
            os.close(copy)


def _content(file: TextIO) -> str:
    file.seek(0)
    return file.read()
