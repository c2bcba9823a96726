"""Run `tunery filter` in one process: the real checks, stages and files, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunery.events.event_log import EventLog
from tunery.filter.filter_checks import check_models, check_sources, command_line_errors
from tunery.filter.filter_command import RowFiles, write_experiment
from tunery.filter.filter_experiment import ROWS, FilterRequest, generate_experiment
from tunery.filter.outputs import Outputs
from tunery.ingest.sources import source_identity
from tunery.pipeline.compute import Hardware, resolve_compute
from tunery.pipeline.execute import execute
from tunery.pipeline.run_context import RunContext
from tunery.run import validate_experiment
from tunery.spec import load
from tunery.store import Store
from tunery.workers.cluster_resources import NodeResources


def run_filter_in_process(
    *sources: str, out: str, dropped: str | None = None, store: str = "store", **options: Any
) -> Outputs:
    """Run the command with these options. Relative paths refer to the current folder."""
    request = FilterRequest(sources, Path(out), **options)
    check_sources(request)
    generated = generate_experiment(request)
    check_models(generated)
    write_experiment(request.file, generated.text)
    with command_line_errors(request, generated):
        experiment, source = load(request.file)
        experiment = validate_experiment(experiment, source, Store(Path(store)))
        compute, _ = resolve_compute(experiment.compute, Hardware([NodeResources(2)], "here"))
        stage, folder = experiment.stages[ROWS], request.file.parent
        files = RowFiles(request, Path(dropped) if dropped else None, generated, stage, source_identity(stage, folder))
        run_context = RunContext(Store(Path(store)), Path(store) / "run", request.file)
        log = EventLog(run_context.events / "e.jsonl")
        with files.dropped_if_none_kept(print):
            artifacts = execute(experiment.model_copy(update={"compute": compute}), run_context, log)
        return files.write(artifacts)
