"""Resolve `auto` values of training stages, with the rule that was applied. Pure; used by the plan and the training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tunery.spec import AUTO, TRAINERS, Scratch, Training, adapter_spec, tuner_of

GLOBAL_BATCH_SIZES = (8, 16, 64, 128)
"""All values of `auto`, so that a size that never fits is reported before the rows are counted."""


@dataclass(frozen=True)
class Resolved:
    """The resolved value of a field and the rule that gave it."""

    field: str
    value: Any
    rule: str


def resolve(stage: Training[Any], rows: int) -> tuple[Training[Any], list[Resolved]]:
    """Return the stage with all `auto` values resolved for `rows` training sequences, and the resolved fields."""
    resolved: list[Resolved] = []
    if stage.epochs == AUTO:
        resolved.append(Resolved("epochs", *_epochs(stage, rows)))
    if stage.learning_rate == AUTO:
        resolved.append(Resolved("learning_rate", *_learning_rate(stage)))
    if stage.global_batch_size == AUTO:
        resolved.append(Resolved("global_batch_size", *_global_batch_size(stage, rows)))
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
    """Return the possible global batch sizes of a stage: the given one, or all values of `auto`, in complete groups."""
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
