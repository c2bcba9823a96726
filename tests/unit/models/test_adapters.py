"""Tuners applied to models: PEFT configs, and the parameters that stay trainable."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from tunery.models.adapters import freeze_untrained, peft_config
from tunery.spec import ADAPTERS, Lora, LoraTuner


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.fixture
def model() -> nn.Module:
    return nn.ModuleDict({"layer": nn.Linear(2, 2), "score": nn.Linear(2, 1, bias=False)})


@pytest.mark.parametrize("tuner", ["full", LoraTuner(lora=Lora())])
def test_full_fine_tuning_and_adapters_freeze_nothing_themselves(model: nn.Module, tuner: str | LoraTuner) -> None:
    freeze_untrained(model, tuner)
    assert trainable(model) == {"layer.weight", "layer.bias", "score.weight"}


def test_tuner_without_adapter_trains_its_parameters_and_new_modules(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    biases = dataclasses.replace(ADAPTERS["full"], kind="biases", trains=lambda _, name: name.endswith("bias"))
    monkeypatch.setattr(ADAPTERS, "_entries", {**ADAPTERS, "biases": biases})
    freeze_untrained(model, "biases", new_modules=["score"])
    assert trainable(model) == {"layer.bias", "score.weight"}
    assert peft_config("biases", "CAUSAL_LM") is None


def test_lora_trains_the_parameters_that_its_entry_names() -> None:
    from peft import get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    tuned = get_peft_model(llama, peft_config(LoraTuner(lora=Lora(rank=2)), "CAUSAL_LM"))
    assert trainable(tuned) == {name for name, _ in tuned.named_parameters() if ADAPTERS["lora"].trains(None, name)}
