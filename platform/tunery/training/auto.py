"""What `auto` becomes, and by which rule. Pure; the same for the plan that is printed and the training that runs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tunery.spec import AUTO, Dpo, Grpo, Kto, Ppo, Pretrain, Rloo, Scratch, Training
from tunery.training.batches import group_size

GLOBAL_BATCH_SIZES = (8, 16, 64, 128)
"""All that `auto` may become: what no number of rows makes fit is told before the rows are counted."""


@dataclass(frozen=True)
class Resolved:
    """A field's value and the rule that it came from."""

    field: str
    value: Any
    rule: str


def resolve(stage: Training[Any], rows: int) -> tuple[Training[Any], list[Resolved]]:
    """The stage with no `auto` left, for `rows` training sequences."""
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
    tuned = getattr(stage, "tuner", "full") != "full"
    if isinstance(stage, Dpo | Kto | Grpo | Rloo | Ppo):
        # TRL's default for DPO, GRPO and RLOO (1e-6, 1.16); LoRA as below.
        return (1e-5, "LoRA: ten times full fine-tuning's rate") if tuned else (1e-6, "preferences and rewards, full")
    if tuned:
        # LoRA wants about ten times the rate of full fine-tuning (https://thinkingmachines.ai/blog/lora).
        return 2e-4, "LoRA: ten times full fine-tuning's rate"
    return 2e-5, "full fine-tuning of a pretrained model"


def global_batch_sizes(stage: Training[Any]) -> tuple[int, ...]:
    """What the stage's may be: the one that is given, or all that `auto` may become. Whole groups of answers."""
    if stage.global_batch_size != AUTO:
        return (stage.global_batch_size,)
    group = _whole(stage)
    return tuple(math.ceil(size / group) * group for size in GLOBAL_BATCH_SIZES)


def _whole(stage: Training[Any]) -> int:
    """What a batch has to be a multiple of."""
    return stage.minibatches if isinstance(stage, Ppo) else group_size(stage)


def _global_batch_size(stage: Training[Any], rows: int) -> tuple[int, str]:
    few, more, many, most = global_batch_sizes(stage)
    groups = f", a multiple of {_whole(stage)}" if _whole(stage) > 1 else ""
    if rows < 1_000:
        return few, f"fewer than 1,000 rows{groups}"
    if rows < 10_000:
        return more, f"fewer than 10,000 rows{groups}"
    return (many, f"fewer than 100,000 rows{groups}") if rows < 100_000 else (most, f"100,000 rows or more{groups}")
