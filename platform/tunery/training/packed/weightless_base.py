"""PEFT's own adapter on a base without weights: what begins, saves and loads a pack's adapters as PEFT does.

A training alone draws its adapter by PEFT, right after its seed was set; here the same is drawn without a second copy
of the base, and what is saved is what any other adapter's folder holds.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tunery.models.adapters import lora_config
from tunery.spec import Lora
from tunery.training.packed.stack import Adapter, Matrices

PREFIX = "base_model.model."
"""Before the names of the base's own modules in PEFT's."""


def weightless_base(model: PreTrainedModel) -> PreTrainedModel:
    """The same modules, whose weights take no memory. Not on the meta device: PEFT (0.21) makes the adapter there, too,
    and it would have no numbers."""
    with torch.device("meta"):
        outline: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    for module in outline.modules():
        for name, weight in module._parameters.items():
            if weight is not None:
                module._parameters[name] = nn.Parameter(torch.zeros(()).expand(weight.shape), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.zeros((), dtype=buffer.dtype).expand(buffer.shape)
    return outline


def with_adapter(model: PreTrainedModel, lora: Lora, seed: int) -> Any:
    """A PeftModel on an outline of `model` whose adapter is drawn from `seed`, on the CPU."""
    from peft import get_peft_model

    outline = weightless_base(model)
    torch.manual_seed(seed)
    return get_peft_model(outline, lora_config(lora, "CAUSAL_LM"))


def adapter_of(peft_model: Any) -> Adapter:
    """Its matrices themselves: what is learned of them is what the PeftModel saves."""
    weights: Matrices = {}
    scale = 1.0
    for name, module in peft_model.named_modules():
        if hasattr(module, "lora_A") and len(module.lora_A):
            pair = (module.lora_A["default"].weight.data, module.lora_B["default"].weight.data)
            weights[name.removeprefix(PREFIX)] = pair
            scale = module.scaling["default"]
    return Adapter(weights, scale)
