"""From a tuner's spec to PEFT's configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunery.spec import AUTO, Lora

if TYPE_CHECKING:
    from peft import PeftConfig


def lora_config(lora: Lora) -> PeftConfig:
    """`all-linear` leaves out the output head, as PEFT defines it."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha == AUTO else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules == AUTO else list(lora.target_modules),
        task_type="CAUSAL_LM",
    )
