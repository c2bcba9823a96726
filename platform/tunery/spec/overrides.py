"""An experiment with other values at some paths (`sft.learning_rate`): what a trial is."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from tunery.spec.experiment import Experiment
from tunery.spec.trainings import OVERRIDABLE


class PathError(ValueError):
    """A path that leads to no field; `remedy` names the nearest ones."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def with_overrides(experiment: Experiment, overrides: Mapping[str, Any]) -> Experiment:
    """A new experiment, validated as a whole. Raises PathError, or pydantic's ValidationError for a bad value."""
    data = experiment.model_dump(mode="json")
    # What leads to another field comes first: `sft.tuner`, and then `sft.tuner.lora.rank`.
    for path, value in sorted(overrides.items(), key=lambda item: item[0].count(".")):
        _put(data["stages"], path, value)
    return Experiment.model_validate_json(json.dumps(data), strict=True)


def _put(stages: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    if not parents:
        raise PathError(f"`{path}` names no field", "write <stage>.<field>, such as sft.learning_rate")
    here: Any = stages
    for depth, key in enumerate([*parents, last]):
        if isinstance(here, list) and key.isdigit() and int(key) < len(here):
            step: str | int = int(key)
        elif isinstance(here, dict) and key in here:
            step = key
        else:
            names = list(here) if isinstance(here, dict) else []
            near = difflib.get_close_matches(key, names, n=1)
            within = ".".join(path.split(".")[:depth]) or "stages"
            listed = f"did you mean `{near[0]}`?" if near else f"`{within}` has: {', '.join(names) or 'no fields'}"
            raise PathError(f"`{path}`: there is no `{key}` in `{within}`", listed)
        if depth == len(parents):
            here[step] = value
        else:
            here = here[step]


def final_values(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """A trial's values at its end: of what changes in the course of its trainings the last ones."""
    now = dict(overrides)
    for path, changes in overrides.items():
        stage, _, field = path.rpartition(".")
        for change in changes if field == "schedule_overrides" else ():
            now |= {f"{stage}.{name}": change[name] for name in OVERRIDABLE if change.get(name) is not None}
    return now
