"""Run experiments in the process of the tests, on a Ray and workers that are started once for all of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from workspace import Workspace

from tunery.events.event_log import EventLog
from tunery.pipeline.execute import RunContext, execute
from tunery.pipeline.ray_session import RaySession
from tunery.spec import Compute, load
from tunery.store import Store
from tunery.training.launch import OnWorkers


@dataclass
class RunsHere:
    session: RaySession
    compute: Compute

    def execute(self, bench: Workspace, compute: Compute | None = None) -> dict[str, Path]:
        """Run the stages of the experiment; return the artifacts' folders by stage."""
        compute = compute or self.compute
        experiment, _ = load(bench.file)
        run_context = RunContext(Store(bench.store), bench.run, bench.file)
        artifacts = execute(
            experiment.model_copy(update={"compute": compute}),
            run_context,
            EventLog(run_context.events / "driver.jsonl"),
            lambda stage: OnWorkers(self.session.workers, compute),
        )
        return {name: artifact.path for name, artifact in artifacts.items()}
