"""PEFT configuration of a LoRA tuner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from tunery.spec import AUTO, Lora

if TYPE_CHECKING:
    from peft import PeftConfig


def lora_config(lora: Lora, task: Literal["CAUSAL_LM", "SEQ_CLS"], new: Sequence[str] = ()) -> PeftConfig:
    """Build the PEFT config. `all-linear` excludes the output head, as PEFT defines it. A classification head and the
    randomly initialized modules `new` are fully trained and saved with the adapter."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha == AUTO else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules == AUTO else list(lora.target_modules),
        task_type=task,
        modules_to_save=list(new) or None,
        exclude_modules=list(new) or None,
    )
