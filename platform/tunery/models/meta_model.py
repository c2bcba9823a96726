"""Inspect a model by its config only, without weights: layers that LoRA can adapt, and the number of positions.

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

Form = Literal["causal", "classifier", "body"]
"""Head of a model: language modelling, classification, or none."""
DECLARED = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")
"""Config fields with the number of positions."""
MARGIN = 8
"""Additional (OPT: 2) or unusable (RoBERTa: 2) rows that a position embedding may have."""


@dataclass(frozen=True)
class PositionLimit:
    """Maximum sequence length of a model."""

    tokens: int
    is_table: bool
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
    """Return the number of positions in a config.json, without torch; None if it has none."""
    for part in (config, config.get("text_config") or {}):
        for name in DECLARED:
            if isinstance(part.get(name), int) and part[name] > 0:
                return int(part[name])
    return None


@lru_cache(maxsize=32)
def weightless_model(name: str, form: Form, revision: str | None = None) -> PreTrainedModel | None:
    """Build the model of a folder, a hub name (with a downloaded config) or `scratch:tiny` without weights. Returns
    None if transformers can't build it from its config; loading it reports why."""
    import torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    auto_classes: dict[Form, Any] = {
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
    declared = next((value for name in DECLARED if (value := getattr(config, name, None))), None)
    if not isinstance(declared, int) or declared <= 0:
        return None
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        is_position_embedding = "pos" in name or name.endswith("wpe.weight")
        if is_position_embedding and tensor.dim() == 2 and declared <= tensor.shape[0] <= declared + MARGIN:
            # RoBERTa's positions start after the padding index: 514 positions allow 512 tokens.
            padding = getattr(model.get_submodule(name.rpartition(".")[0]), "padding_idx", None)
            rows = tensor.shape[0] - (0 if padding is None else padding + 1)
            return PositionLimit(int(min(declared, rows)), True)
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


def check_target_modules(model: PreTrainedModel, targets: Sequence[str], form: Form) -> None:
    """Raise BadModel if a name in `target_modules` matches no layer that LoRA can adapt, or a layer whose adapter would
    be lost or would change another layer."""
    layers = _lora_layers(model)
    head, embedding = _head_and_embedding(model) if form == "causal" else ("", "")
    backbone = f"{model.base_model_prefix}." if form == "classifier" else ""
    tied = bool(head) and model.get_output_embeddings().weight is model.get_input_embeddings().weight
    rejected = {head} | ({embedding} if tied else set())
    valid = [name for name in layers if name not in rejected and name.startswith(backbone)]
    remedy = "valid names: " + ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in valid))
    for target in targets:
        if head and matches(target, head):
            raise BadModel(
                f"`{target}` is the output head, and an adapter on it would not be trained",
                "losses are computed from the head's own weight, without its logits in memory"
                + (", and it is the embedding's too (tie_word_embeddings)" if tied else ""),
                remedy,
            )
        if tied and matches(target, embedding):
            raise BadModel(
                f"`{target}` is the embedding, whose weight is the output head's too (tie_word_embeddings)",
                "training would change only the embedding; merging the adapter would change both",
                f"{remedy}; `tuner: full` trains the embedding too",
            )
        if not any(matches(target, name) for name in valid) and target not in _converted(model, targets):
            raise BadModel(
                f"`{target}` matches no layer of the model that LoRA can adapt",
                "a name matches layers with this full name or suffix",
                remedy,
            )


def matches(target: str, name: str) -> bool:
    """Whether a target matches a module name, as in PEFT (0.21)."""
    return name == target or name.endswith(f".{target}")


def _lora_layers(model: PreTrainedModel) -> list[str]:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    kinds = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds)]


def _head_and_embedding(model: PreTrainedModel) -> tuple[str, str]:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    return names.get(id(head), ""), names.get(id(embedding), "")


def _converted(model: PreTrainedModel, targets: Sequence[str]) -> set[str]:
    """Names that PEFT (0.21) converts to parameters, because transformers 5 fuses the expert layers of some models."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import (
        convert_peft_config_for_transformers,
        get_model_conversion_mapping,
    )

    config = LoraConfig(target_modules=list(targets))
    try:
        convert_peft_config_for_transformers(config, model=model, conversions=get_model_conversion_mapping(model))
    except ValueError:  # only some of the names that must be given together; PEFT reports it in training
        return set(targets)
    return set(targets) - set(config.target_modules or ())
