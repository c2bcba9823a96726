"""Context for calling the function of a stage in a test: one process, no Ray, events are discarded."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunery.spec import Compute, Stage
from tunery.spec.references import Config
from tunery.store import Artifact, StageContext
from tunery.training.launch import InProcessLauncher


def stage_context(spec: Stage, inputs: Mapping[str, Artifact], root: Path, **fields: Any) -> StageContext:
    """Return the context of a stage whose folders are all `root`; `fields` replaces fields of the context."""
    folders = dict.fromkeys(("folder", "out", "staging_dir", "store", "scores", "events", "logs"), root)
    defaults = {
        **folders,
        "name": "stage",
        "trial": "",
        "spec": spec,
        "inputs": inputs,
        "seed": 5,
        "compute": Compute(workers=1, device="cpu"),
        "launcher": InProcessLauncher(),
        "emit": lambda *_, **__: None,
    }
    return StageContext(**{**defaults, **fields})


def parsed(kind: type[Config], fields: dict[str, Any]) -> Any:
    """Return a stage with these fields, as in an experiment file."""
    return kind.model_validate_json(json.dumps(fields))


def dataset(path: Path, kind: str = "dataset", **facts: Any) -> Artifact:
    """Return an artifact whose rows are in `path`."""
    return Artifact(path, {"kind": kind, "fingerprint": "0", "facts": facts}, {})
