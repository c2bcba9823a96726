"""Config fields that differ between two experiments, by path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.compare.sides import RunSelection
from tunery.spec import AUTO, Dataset, Experiment


@dataclass(frozen=True)
class FieldDifference:
    path: str
    left: Any
    """None if it is not set."""
    right: Any


@dataclass(frozen=True)
class FieldDifferences:
    differ: tuple[FieldDifference, ...]
    only_left: tuple[str, ...]
    """Names of stages."""
    only_right: tuple[str, ...]


def compare_fields(left: RunSelection, right: RunSelection) -> FieldDifferences:
    """Differences in the stages that both have, the seed and the search. `auto` is compared by its resolved value, if
    that is known; a dataset with equal fields also by the content of its files."""
    one, other = left.experiment.stages, right.experiment.stages
    both = [name for name in one if name in other]
    differences = [*_diff(*_experiment_fields(left.experiment, right.experiment), "")]
    for name in both:
        in_stage = [*_diff(_stage_fields(left, name), _stage_fields(right, name), f"{name}.")]
        differences += in_stage or _content_diff(left, right, name)
    return FieldDifferences(
        tuple(differences),
        tuple(name for name in one if name not in other),
        tuple(name for name in other if name not in one),
    )


def _experiment_fields(left: Experiment, right: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields outside the stages that change results (`compute` and `tracking` do not). A search that only one side has
    is reduced to its metric."""
    included = {"seed", "search"}
    one, other = (side.model_dump(mode="json", include=included, exclude_none=True) for side in (left, right))
    for fields, others in ((one, other), (other, one)):
        if "search" in fields and "search" not in others:
            fields["search"] = f"for {fields['search']['metric']}"
    return one, other


def _content_diff(left: RunSelection, right: RunSelection, name: str) -> list[FieldDifference]:
    """The fingerprints of a dataset with equal fields, if the content of its files differs (and not only the seed)."""
    stage, fingerprints = left.experiment.stages[name], [side.fingerprints.get(name) for side in (left, right)]
    if not isinstance(stage, Dataset) or None in fingerprints or fingerprints[0] == fingerprints[1]:
        return []
    by_seed = stage.corrupt_fraction and left.experiment.seed != right.experiment.seed
    return [] if by_seed else [FieldDifference(f"{name}: content of its files", *fingerprints)]


def _stage_fields(side: RunSelection, stage: str) -> dict[str, Any]:
    """The stage's fields, with the resolved values of `auto`."""
    fields = side.experiment.stages[stage].model_dump(mode="json", exclude_none=True)
    for name, resolved in (side.facts(stage).get("resolved") or {}).items():
        if fields.get(name) == AUTO:
            fields[name] = f"{resolved['value']:g} (auto)"
    return fields


def _diff(left: Any, right: Any, prefix: str) -> Iterator[FieldDifference]:
    """Compare mappings recursively, other values as a whole."""
    for name in {**left, **right}:
        one, other = left.get(name), right.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _diff(one, other, f"{prefix}{name}.")
        elif one != other:
            yield FieldDifference(f"{prefix}{name}", one, other)
