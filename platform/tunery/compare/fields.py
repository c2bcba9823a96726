"""Fields that differ between two experiments, by their paths. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.compare.sides import RunSelection
from tunery.spec import AUTO, Dataset, Experiment


@dataclass(frozen=True)
class Field:
    path: str
    left: Any
    """None where it isn't given."""
    right: Any


@dataclass(frozen=True)
class Fields:
    differ: tuple[Field, ...]
    only_left: tuple[str, ...]
    """Stages."""
    only_right: tuple[str, ...]


def compare_fields(left: RunSelection, right: RunSelection) -> Fields:
    """Of the stages that both have, of the seed and of the search. What `auto` became counts, where it is known, and so
    does another content of a dataset's files."""
    one, other = left.experiment.stages, right.experiment.stages
    both = [name for name in one if name in other]
    found = [*_differ(*_shared(left.experiment, right.experiment), "")]
    for name in both:
        own = [*_differ(_fields(left, name), _fields(right, name), f"{name}.")]
        found += own or _content(left, right, name)
    return Fields(
        tuple(found),
        tuple(name for name in one if name not in other),
        tuple(name for name in other if name not in one),
    )


def _shared(left: Experiment, right: Experiment) -> tuple[dict[str, Any], dict[str, Any]]:
    """Beside the stages; `compute` and `tracking` say how, not what. Of a search that only one has, little is told."""
    wanted = {"seed", "search"}
    one, other = (told.model_dump(mode="json", include=wanted, exclude_none=True) for told in (left, right))
    for told, beside in ((one, other), (other, one)):
        if "search" in told and "search" not in beside:
            told["search"] = f"for {told['search']['metric']}"
    return one, other


def _content(left: RunSelection, right: RunSelection, name: str) -> list[Field]:
    """Of a dataset with the same fields whose fingerprint differs: by its files, where it isn't by the seed."""
    stage, prints = left.experiment.stages[name], [side.prints.get(name) for side in (left, right)]
    if not isinstance(stage, Dataset) or None in prints or prints[0] == prints[1]:
        return []
    by_seed = stage.corrupt_fraction and left.experiment.seed != right.experiment.seed
    return [] if by_seed else [Field(f"{name}: content of its files", *prints)]


def _fields(side: RunSelection, stage: str) -> dict[str, Any]:
    """As the experiment has them, and in place of `auto` what it became."""
    fields = side.experiment.stages[stage].model_dump(mode="json", exclude_none=True)
    for name, became in (side.facts(stage).get("resolved") or {}).items():
        if fields.get(name) == AUTO:
            fields[name] = f"{became['value']:g} (auto)"
    return fields


def _differ(left: Any, right: Any, above: str) -> Iterator[Field]:
    """Mappings field by field; of anything else the whole."""
    for name in {**left, **right}:
        one, other = left.get(name), right.get(name)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _differ(one, other, f"{above}{name}.")
        elif one != other:
            yield Field(f"{above}{name}", one, other)
