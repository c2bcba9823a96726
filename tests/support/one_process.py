"""Build stages in one process with one worker and no Ray, as a trial of a search does. The process is started once for
all tests: importing torch, TRL and DeepSpeed takes 10 s."""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any


def build_stages(file: Path, store: Path, *names: str, **environment: str) -> dict[str, dict[str, Any]]:
    """Build the stages of an experiment; return path, facts and stats by stage. With `names`, build each of these
    stages on its own and return only them, with the error of a stage that fails. Another `environment` is another
    process."""
    process = _process(frozenset(environment.items()))
    return process.submit(_build_stages, file, store, names).result(timeout=500)


@cache
def _process(environment: frozenset[tuple[str, str]]) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _start, (dict(environment),))


def _start(environment: dict[str, str]) -> None:
    os.environ.update({"WANDB_MODE": "offline", **environment})
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)


def _build_stages(file: Path, store: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    from tunery.errors import StageError
    from tunery.events.event_log import EventLog
    from tunery.pipeline.compute import Hardware, resolve_compute
    from tunery.pipeline.execute import execute
    from tunery.pipeline.run_context import RunContext
    from tunery.spec import load
    from tunery.spec.graph import with_upstream
    from tunery.store import Store
    from tunery.workers.cluster_resources import NodeResources

    os.chdir(file.parent)
    experiment, _ = load(file)
    compute, _ = resolve_compute(experiment.compute, Hardware([NodeResources(2)], "here"))
    run_context = RunContext(Store(store), store / "run", file)
    results: dict[str, dict[str, Any]] = {}
    for targets in [[name] for name in names] or [list(experiment.stages)]:
        own = {"compute": compute, "stages": with_upstream(experiment.stages, targets)}
        try:
            artifacts = execute(
                experiment.model_copy(update=own), run_context, EventLog(run_context.events / "driver.jsonl")
            )
        except StageError as error:
            if not names:
                raise
            results[targets[0]] = {"error": str(error)}
            continue
        results |= {
            name: {"path": str(item.path), "facts": item.facts, "runtime_stats": item.runtime_stats}
            for name, item in artifacts.items()
            if name in (names or artifacts)
        }
    return results
