"""Tuners applied to a model: their PEFT configs, and which parameters they train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from tunery.spec import AUTO, Lora, Tuner, adapter_spec, settings_of

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

TaskType = Literal["CAUSAL_LM", "SEQ_CLS"]


def peft_config(tuner: Tuner, task: TaskType, new_modules: Sequence[str] = ()) -> PeftConfig | None:
    """Return the PEFT config of a tuner; None for a tuner without adapter. `new_modules`: randomly initialized modules,
    which are fully trained and saved with the adapter; so is a classification head."""
    spec = adapter_spec(tuner)
    return spec.build_peft_config(settings_of(tuner), task, list(new_modules)) if spec.has_adapter else None


def freeze_untrained(model: nn.Module, tuner: Tuner, new_modules: Sequence[str] = ()) -> None:
    """Freeze the parameters that a tuner without adapter does not train. `new_modules`: randomly initialized modules,
    which are always trained."""
    spec, settings = adapter_spec(tuner), settings_of(tuner)
    for name, parameter in model.named_parameters():
        is_new = any(name.startswith(f"{module}.") for module in new_modules)
        if not (spec.has_adapter or is_new or spec.trains(settings, name)):
            parameter.requires_grad_(False)


def lora_config(lora: Lora, task: TaskType, new_modules: Sequence[str] = ()) -> Any:
    """Return the PEFT config of LoRA. By PEFT's definition, `all-linear` excludes the output head."""
    from peft import LoraConfig

    return LoraConfig(
        r=lora.rank,
        lora_alpha=2 * lora.rank if lora.alpha == AUTO else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.target_modules == AUTO else list(lora.target_modules),
        task_type=task,
        modules_to_save=list(new_modules) or None,
        exclude_modules=list(new_modules) or None,
    )
