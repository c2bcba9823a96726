"""Inspect a model by its config, without weights: layers that LoRA can adapt, and the maximum sequence length.

The model is built on torch's meta device, where weights take no memory. This takes seconds for any size, mostly to
import torch, so imports are lazy.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunery.models.model_folder import BadModel
from tunery.models.scratch import SHAPES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

ModelForm = Literal["causal", "classifier", "body"]
"""Which head a model has: for language modelling, for classification, or none ("body")."""
POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
"""Config fields with the number of positions, by their names in different models."""
MAX_EXTRA_POSITIONS = 8
"""Maximum number of additional (OPT: 2) or unusable (RoBERTa: 2) rows of a position embedding."""


@dataclass(frozen=True)
class PositionLimit:
    """Maximum sequence length of a model."""

    tokens: int
    is_learned: bool
    """Whether positions are learned embeddings (GPT-2, BERT, GPT-J), so that longer sequences fail. Otherwise (RoPE)
    longer sequences can be computed, but the model was not trained on them."""


# Configs.


def config_of_folder(folder: Path) -> dict[str, Any]:
    """Return the content of config.json; empty if unreadable (models/model_folder.py reports that)."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def declared_positions(config: Mapping[str, Any]) -> int | None:
    """Return the number of positions in the content of a config.json, without torch; None if it has none."""
    for fields in (config, config.get("text_config") or {}):
        for name in POSITION_FIELDS:
            if isinstance(fields.get(name), int) and fields[name] > 0:
                return int(fields[name])
    return None


@lru_cache(maxsize=32)
def weightless_model(name: str, form: ModelForm, revision: str | None = None) -> PreTrainedModel | None:
    """Return a model without weights; None if transformers can't build it from its config, for which loading gives the
    reason. `name`: a folder, a hub name whose config is downloaded, or `scratch:tiny`."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    auto_classes: dict[ModelForm, Any] = {
        "causal": AutoModelForCausalLM,
        "classifier": AutoModelForSequenceClassification,
        "body": AutoModel,
    }
    try:
        config = (
            _scratch_config(name.removeprefix("scratch:"))
            if name.startswith("scratch:")
            else AutoConfig.from_pretrained(name, revision=revision, local_files_only=True, trust_remote_code=False)
        )
        with torch.device("meta"):
            model: PreTrainedModel = auto_classes[form].from_config(config, trust_remote_code=False)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RuntimeError, ImportError):
        return None
    return model


def _scratch_config(name: str) -> PretrainedConfig:
    from tunery.models.scratch import scratch_config

    return scratch_config(SHAPES[name])


# Positions.


def position_limit(model: PreTrainedModel) -> PositionLimit | None:
    """Return the maximum sequence length of the model; None if its config has none."""
    config = model.config.get_text_config()
    declared = next((value for name in POSITION_FIELDS if (value := getattr(config, name, None))), None)
    if not isinstance(declared, int) or declared <= 0:
        return None
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_position_embedding = "pos" in name or name.endswith("wpe.weight")
        if (
            is_position_embedding
            and tensor.dim() == 2
            and declared <= tensor.shape[0] <= declared + MAX_EXTRA_POSITIONS
        ):
            # RoBERTa's positions start after the padding index: 514 positions allow 512 tokens.
            padding_idx = getattr(model.get_submodule(name.rpartition(".")[0]), "padding_idx", None)
            num_positions = tensor.shape[0] - (0 if padding_idx is None else padding_idx + 1)
            return PositionLimit(int(min(declared, num_positions)), True)
    return PositionLimit(int(declared * _rope_factor(config, declared)), False)


def _rope_factor(config: Any, declared: int) -> float:
    """Return the factor by which RoPE scaling extends the declared positions (YaRN: Peng et al. 2023,
    https://arxiv.org/abs/2309.00071); 1 if they include the extension already, as in Llama 3.1."""
    scaling = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    factor = scaling.get("factor") if isinstance(scaling, dict) else None
    if not isinstance(factor, int | float):
        return 1.0
    return max(1.0, factor * (scaling.get("original_max_position_embeddings") or declared) / declared)


# Layers for LoRA.


def check_target_modules(model: PreTrainedModel, targets: Sequence[str], form: ModelForm) -> None:
    """Raise BadModel if a name in `target_modules` matches no layer that LoRA can adapt, or if an adapter on the layer
    would not be trained or would change another layer too."""
    layers = _lora_layers(model)
    head, embedding = _head_and_embedding(model) if form == "causal" else ("", "")
    prefix = f"{model.base_model_prefix}." if form == "classifier" else ""
    is_tied = bool(head) and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rejected = {head} | ({embedding} if is_tied else set())
    valid = [name for name in layers if name not in rejected and name.startswith(prefix)]
    remedy = "valid names: " + ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in valid))
    for target in targets:
        if head and matches(target, head):
            raise BadModel(
                f"`{target}` is the output head, and an adapter on it would not be trained",
                "losses are computed from the head's own weight, without its logits in memory"
                + (", and it is the embedding's too (tie_word_embeddings)" if is_tied else ""),
                remedy,
            )
        if is_tied and matches(target, embedding):
            raise BadModel(
                f"`{target}` is the embedding, whose weight is the output head's too (tie_word_embeddings)",
                "training would change only the embedding; merging the adapter would change both",
                f"{remedy}; `tuner: full` trains the embedding too",
            )
        if not any(matches(target, name) for name in valid) and target not in _fused_names(model, targets):
            raise BadModel(
                f"`{target}` matches no layer of the model that LoRA can adapt",
                "a name matches layers with this full name or suffix",
                remedy,
            )


def matches(target: str, name: str) -> bool:
    """Whether a name in `target_modules` matches a module's name, as in PEFT (0.21)."""
    return name == target or name.endswith(f".{target}")


def _lora_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that LoRA can adapt."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    layer_types = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, layer_types)]


def _head_and_embedding(model: PreTrainedModel) -> tuple[str, str]:
    """Return the module names of the output head and the input embedding; "" if the model has none."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(head), ""), names.get(id(embedding), "")


def _fused_names(model: PreTrainedModel, targets: Sequence[str]) -> set[str]:
    """Return the targets that PEFT (0.21) maps to fused parameters: transformers 5 fuses the expert layers of some
    models."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_config_for_transformers,
        get_model_conversion_mapping,
    )

    config = LoraConfig(target_modules=list(targets))
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=get_model_conversion_mapping(model))
    except ValueError:  # names that must be given together are incomplete; PEFT reports it in training
        return set(targets)
    return set(targets) - set(config.target_modules or ())
