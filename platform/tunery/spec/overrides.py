"""Apply overrides (values by path, such as `sft.learning_rate`) to an experiment. Every trial is one."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any

from tunery.spec.experiment import Experiment
from tunery.spec.trainings import OVERRIDABLE


class PathError(ValueError):
    """A path of a field that does not exist; `remedy` suggests similar ones."""

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.remedy = remedy


def with_overrides(experiment: Experiment, overrides: Mapping[str, Any]) -> Experiment:
    """Return a new, validated experiment. Raises PathError, or pydantic's ValidationError for an invalid value."""
    data = experiment.model_dump(mode="json")
    # Parent paths come first: `sft.tuner` before `sft.tuner.lora.rank`.
    for path, value in sorted(overrides.items(), key=lambda item: item[0].count(".")):
        _put(data["stages"], path, value)
    return Experiment.model_validate_json(json.dumps(data), strict=True)


def _put(stages: dict[str, Any], path: str, value: Any) -> None:
    *parents, last = path.split(".")
    if not parents:
        raise PathError(
            f"`{path}`: a path has a stage and a field", "use <stage>.<field>, for example sft.learning_rate"
        )
    node: Any = stages
    for depth, key in enumerate([*parents, last]):
        if isinstance(node, list) and key.isdigit() and int(key) < len(node):
            step: str | int = int(key)
        elif isinstance(node, dict) and key in node:
            step = key
        else:
            names = list(node) if isinstance(node, dict) else []
            near = difflib.get_close_matches(key, names, n=1)
            within = ".".join(path.split(".")[:depth]) or "stages"
            remedy = f"did you mean `{near[0]}`?" if near else f"`{within}` has: {', '.join(names) or 'no fields'}"
            raise PathError(f"`{path}`: there is no `{key}` in `{within}`", remedy)
        if depth == len(parents):
            node[step] = value
        else:
            node = node[step]


def final_values(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a trial at its end, after all `schedule_overrides`."""
    values = dict(overrides)
    for path, changes in overrides.items():
        stage, _, field = path.rpartition(".")
        for change in changes if field == "schedule_overrides" else ():
            values |= {f"{stage}.{name}": change[name] for name in OVERRIDABLE if change.get(name) is not None}
    return values
