"""Resolve the `auto` values of training stages, with the rule that was applied. Pure functions, used by the plan of a
run and by the trainings."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tunery.spec import AUTO, TRAINERS, Scratch, Training, adapter_spec, tuner_of

GLOBAL_BATCH_SIZES = (8, 16, 64, 128)
"""All values that `global_batch_size: auto` can have. They are validated before the rows are counted."""


@dataclass(frozen=True)
class ResolvedField:
    """A field that was `auto`, its value, and the rule that gave the value."""

    field: str
    value: Any
    rule: str


def resolve_auto(stage: Training[Any], rows: int) -> tuple[Training[Any], list[ResolvedField]]:
    """Return the stage with all `auto` values resolved for `rows` training rows, and the resolved fields."""
    resolved: list[ResolvedField] = []
    if stage.epochs == AUTO:
        resolved.append(ResolvedField("epochs", *_epochs(stage, rows)))
    if stage.learning_rate == AUTO:
        resolved.append(ResolvedField("learning_rate", *_learning_rate(stage)))
    if stage.global_batch_size == AUTO:
        resolved.append(ResolvedField("global_batch_size", *_global_batch_size(stage, rows)))
    return stage.model_copy(update={item.field: item.value for item in resolved}), resolved


def _epochs(stage: Training[Any], rows: int) -> tuple[float, str]:
    rule = next(rule for rule in TRAINERS[stage.kind].epochs if rows < rule.max_rows)
    return rule.epochs, rule.reason


def _learning_rate(stage: Training[Any]) -> tuple[float, str]:
    if isinstance(stage.model, Scratch):
        return 2e-3, "a small model from scratch"
    spec, adapter = TRAINERS[stage.kind], adapter_spec(tuner_of(stage))
    if adapter.learning_rate_factor == 1:
        return spec.learning_rate, spec.learning_rate_reason
    return float(f"{adapter.learning_rate_factor * spec.learning_rate:.6g}"), adapter.learning_rate_reason


def global_batch_sizes(stage: Training[Any]) -> tuple[int, ...]:
    """Return the possible global batch sizes of a stage: the given one, or all values of `auto`, rounded up to a
    multiple of `batch_size_multiple`."""
    if stage.global_batch_size != AUTO:
        return (stage.global_batch_size,)
    multiple = stage.batch_size_multiple
    return tuple(math.ceil(size / multiple) * multiple for size in GLOBAL_BATCH_SIZES)


def _global_batch_size(stage: Training[Any], rows: int) -> tuple[int, str]:
    smallest, small, medium, large = global_batch_sizes(stage)
    multiple = f", a multiple of {stage.batch_size_multiple}" if stage.batch_size_multiple > 1 else ""
    if rows < 1_000:
        return smallest, f"fewer than 1,000 rows{multiple}"
    if rows < 10_000:
        return small, f"fewer than 10,000 rows{multiple}"
    return (
        (medium, f"fewer than 100,000 rows{multiple}") if rows < 100_000 else (large, f"100,000 rows or more{multiple}")
    )
