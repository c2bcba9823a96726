"""Resolve `auto` values of training stages, with the rule that was applied. Pure; used by the plan and the training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tunery.spec import AUTO, Dpo, Grpo, Kto, Ppo, Pretrain, Rloo, Scratch, Training, adapter_spec, tuner_of
from tunery.training.batches import group_size

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
    if isinstance(stage, Pretrain):
        # Up to 4 repetitions of the data are worth nearly as much as new data:
        # Muennighoff et al. 2023 (https://arxiv.org/abs/2305.16264).
        return (4.0, "few rows (< 100,000): repeat up to 4 times") if rows < 100_000 else (1.0, "100,000 rows or more")
    if rows < 10_000:
        return 3.0, "fewer than 10,000 rows"
    return (2.0, "fewer than 100,000 rows") if rows < 100_000 else (1.0, "100,000 rows or more")


def _learning_rate(stage: Training[Any]) -> tuple[float, str]:
    if isinstance(stage, Pretrain) and isinstance(stage.model, Scratch):
        return 2e-3, "a small model from scratch"
    if isinstance(stage, Dpo | Kto | Grpo | Rloo | Ppo):
        # TRL's default for DPO, GRPO and RLOO (1e-6, 1.16).
        rate, reason = 1e-6, "preferences and rewards, full"
    else:
        rate, reason = 2e-5, "full fine-tuning of a pretrained model"
    spec = adapter_spec(tuner_of(stage))
    if spec.learning_rate_factor == 1:
        return rate, reason
    return float(f"{spec.learning_rate_factor * rate:.6g}"), spec.learning_rate_reason


def global_batch_sizes(stage: Training[Any]) -> tuple[int, ...]:
    """Return the possible global batch sizes of a stage: the given one, or all values of `auto`, in complete groups."""
    if stage.global_batch_size != AUTO:
        return (stage.global_batch_size,)
    multiple = _required_multiple(stage)
    return tuple(math.ceil(size / multiple) * multiple for size in GLOBAL_BATCH_SIZES)


def _required_multiple(stage: Training[Any]) -> int:
    """Return the number that the global batch size must be a multiple of."""
    return stage.minibatches if isinstance(stage, Ppo) else group_size(stage)


def _global_batch_size(stage: Training[Any], rows: int) -> tuple[int, str]:
    smallest, small, medium, large = global_batch_sizes(stage)
    multiple = f", a multiple of {_required_multiple(stage)}" if _required_multiple(stage) > 1 else ""
    if rows < 1_000:
        return smallest, f"fewer than 1,000 rows{multiple}"
    if rows < 10_000:
        return small, f"fewer than 10,000 rows{multiple}"
    return (
        (medium, f"fewer than 100,000 rows{multiple}") if rows < 100_000 else (large, f"100,000 rows or more{multiple}")
    )
