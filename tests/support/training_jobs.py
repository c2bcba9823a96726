"""Jobs of training stages, for tests of the code that runs in a worker before and after the optimizer steps."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from tunery.spec import Compute, Training
from tunery.store.rows import write_rows
from tunery.training.job import Job, RowSource


def training_job(folder: Path, spec: Training[Any], model: Path, **fields: Any) -> Job:
    """Return a job that trains the pretrained model in the folder `model` with one worker; without rows, unless
    `fields` has them. `fields`: replace those of the job."""
    if "out" not in fields:
        (folder / "out").mkdir(exist_ok=True)
    defaults: dict[str, Any] = {
        "stage": "tuned",
        "trial": "",
        "spec": spec,
        "seed": 1,
        "model": {"pretrained": str(model), "revision": None},
        "data": (),
        "eval_data": (),
        "out": folder / "out",
        "staging_dir": folder / "work",
        "store": folder,
        "events": folder / "events",
        "compute": Compute(),
        "started_at": 0.0,
    }
    return Job(**{**defaults, **fields})


def rows_at(folder: Path, rows: list[dict[str, Any]], label: bool | None = None) -> RowSource:
    """Write rows to a new artifact."""
    artifact = Path(tempfile.mkdtemp(dir=folder))
    write_rows(rows, artifact)
    return RowSource(artifact, label)
