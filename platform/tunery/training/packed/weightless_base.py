"""A PEFT adapter on a base model whose weights take no memory.

With it, PEFT initializes, saves and loads the adapters of a pack in the same way as outside a pack, without a second
base model.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunery.models.adapters import peft_config
from tunery.spec import Tuner
from tunery.training.packed.stack import Adapter, Matrices

PREFIX = "base_model.model."
"""Prefix that PEFT puts before the base model's module names."""


def weightless_base(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of `model` whose weights take no memory: each is a single zero, expanded to its shape. The copy is
    not on the meta device, because PEFT (0.21) would create the adapter there too, without data."""
    with torch.device("meta"):
        base: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    for module in base.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return base


def with_adapter(model: PreTrainedModel, tuner: Tuner, seed: int) -> Any:
    """Return a PeftModel on a weightless copy of `model`, on the CPU. `seed` determines the initial adapter."""
    from peft import get_peft_model

    base = weightless_base(model)
    torch.manual_seed(seed)
    return get_peft_model(base, peft_config(tuner, "CAUSAL_LM"))


def adapter_of(peft_model: Any) -> Adapter:
    """Return the adapter of `peft_model`. It shares its memory, so that saving the PeftModel saves the trained
    weights."""
    weights: Matrices = {}
    scale = 1.0
    for name, module in peft_model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            pair = (module.lora_A["default"].weight.data, module.lora_B["default"].weight.data)
            weights[name.removeprefix(PREFIX)] = pair
            scale = module.scaling["default"]
    return Adapter(weights, scale)
