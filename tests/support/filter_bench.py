"""Run `tunery filter` in one process: the real checks, stages and files, without Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tunery.events.event_log import EventLog
from tunery.filter.filter_checks import check_models, check_sources, command_line_errors
from tunery.filter.filter_command import RowFiles, write_experiment
from tunery.filter.filter_experiment import ROWS, FilterRequest, build
from tunery.filter.outputs import Outputs
from tunery.ingest.sources import source_identity
from tunery.pipeline.compute import Hardware, resolve_compute
from tunery.pipeline.execute import RunContext, execute
from tunery.run import check_all
from tunery.spec import load
from tunery.store import Store


def filter_here(*sources: str, out: str, dropped: str | None = None, store: str = "store", **options: Any) -> Outputs:
    """Run the command with these options. Relative paths start at the current folder."""
    asked = FilterRequest(sources, Path(out), **options)
    check_sources(asked)
    built = build(asked)
    check_models(built)
    write_experiment(asked.file, built.text)
    with command_line_errors(asked, built):
        experiment, source = load(asked.file)
        experiment = check_all(experiment, source, Store(Path(store)))
        compute, _ = resolve_compute(experiment.compute, Hardware(2, 0, "here"))
        stage, folder = experiment.stages[ROWS], asked.file.parent
        files = RowFiles(asked, Path(dropped) if dropped else None, built, stage, source_identity(stage, folder))
        where = RunContext(Store(Path(store)), Path(store) / "run", asked.file)
        log = EventLog(where.events / "e.jsonl")
        with files.dropped_if_none_kept(print):
            made = execute(experiment.model_copy(update={"compute": compute}), where, log)
        return files.write(made)
