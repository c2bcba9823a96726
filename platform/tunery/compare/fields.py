"""Fields that differ between two experiments, by their paths. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunery.compare.sides import Side
from tunery.spec import AUTO, Dataset, Experiment

SHARED = ("seed", "search")
"""Beside the stages: what is the same for all trials of a run. The others say how, not what."""


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


def compare_fields(left: Side, right: Side) -> Fields:
    """Of the stages that both have, of the seed and of the search. What `auto` became counts, where it is known, and so
    does another content of a dataset's files."""
    one, other = left.experiment.stages, right.experiment.stages
    both = [name for name in one if name in other]
    found = [*_differ(_shared(left.experiment), _shared(right.experiment), "")]
    for name in both:
        own = [*_differ(_fields(left, name), _fields(right, name), f"{name}.")]
        prints = [side.prints.get(name) for side in (left, right)]
        if isinstance(one[name], Dataset) and not own and None not in prints and prints[0] != prints[1]:
            own = [Field(f"{name}: content of its files", *prints)]
        found += own
    return Fields(
        tuple(found),
        tuple(name for name in one if name not in other),
        tuple(name for name in other if name not in one),
    )


def _shared(experiment: Experiment) -> dict[str, Any]:
    return experiment.model_dump(mode="json", include=set(SHARED), exclude_none=True)


def _fields(side: Side, stage: str) -> dict[str, Any]:
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
