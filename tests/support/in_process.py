"""Context for calling the function of a stage in a test: one process, no Ray, events are discarded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tunery.spec import Compute
from tunery.spec.references import Config
from tunery.store import Artifact, StageContext


def stage_context(
    kind: type[Config], fields: dict[str, Any], data: Path, models: Path, out: Path, **other: Any
) -> StageContext:
    """Return the context of a stage with these fields, as in an experiment file. `data` is the artifact of its data
    stage; relative paths start at `models`."""
    given = {
        "name": "stage",
        "trial": "",
        "spec": kind.model_validate_json(json.dumps(fields)),
        "inputs": {"data": Artifact(data, {"kind": "dataset", "fingerprint": "0", "facts": {}}, {})},
        "seed": 5,
        "folder": models,
        "out": out,
        **dict.fromkeys(("work", "store", "scores", "events", "logs"), out),
        "compute": Compute(workers=1),
        "emit": lambda *_, **__: None,
        "in_process": True,
    }
    return StageContext(**{**given, **other})
