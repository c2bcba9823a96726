"""Run experiments in the test process, on a Ray session and two workers that are started once per module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from workspace import Workspace

from tunery.events.event_log import EventLog
from tunery.pipeline.compute import batch_sizes, resolve_compute
from tunery.pipeline.execute import execute
from tunery.pipeline.ray_session import RaySession
from tunery.pipeline.run_context import RunContext
from tunery.spec import Compute, load
from tunery.store import Artifact, Store
from tunery.training.launch import WorkersLauncher


@dataclass
class RunsHere:
    session: RaySession
    compute: Compute
    """Two workers on the CPU."""

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
