"""A plugin of tunery with a scorer, two tuners and a trainer, as it would be installed: for PYTHONPATH."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from tunery.spec import (
    AdapterSpec,
    ByOption,
    DataRequirement,
    EpochRule,
    Plugin,
    ScorerEntry,
    ScorerSpec,
    Sft,
    TrainerSpec,
    TunerSpec,
)
from tunery.spec.references import Config


class Vowels(ScorerSpec):
    """Vowels of the response. Higher is better."""

    vowels: Literal["share", "count"]
    """share: of its letters; count: their number."""


class Ia3(Config):
    """Scaling of activations (Liu et al. 2022, https://arxiv.org/abs/2205.05638), by PEFT."""

    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("k_proj", "v_proj", "down_proj")
    """Names of layers."""


class Ia3Tuner(TunerSpec):
    """Trains scales of activations."""

    ia3: Ia3
    """Settings."""


def ia3_config(ia3: Ia3, task: str, new_modules: list[str]) -> Any:
    from peft import IA3Config

    targets = list(ia3.target_modules)
    return IA3Config(
        target_modules=targets,
        feedforward_modules=[name for name in targets if name == "down_proj"],
        task_type=task,
        modules_to_save=new_modules or None,
    )


class SmoothedSft(Sft):
    """Supervised fine-tuning with label smoothing."""

    kind: Literal["smoothed_sft"]
    smoothing: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Weight of the uniform distribution in the target."""


def smoothed_sft_summary(facts: Mapping[str, Any]) -> str:
    return f"smoothed loss {facts['loss']:.2f}, eval loss {facts['eval_loss']:.2f}"


PLUGIN = Plugin(
    stages=(
        TrainerSpec(
            config=SmoothedSft,
            version=1,
            trainer="toy_plugin.smoothed_sft:SmoothedSftTask",
            row_encoding="tunery.models.row_encodings:CONVERSATIONS",
            requirement=DataRequirement(
                ("conversation",), "conversations", "it smooths the targets of responses", "give conversations"
            ),
            summary="toy_plugin:smoothed_sft_summary",
            extra_metrics=("mean_token_accuracy",),
            learning_rate=3e-5,
            learning_rate_reason="label smoothing",
            epochs=(EpochRule(float("inf"), 1.0, "one pass"),),
        ),
    ),
    scorers=(
        ScorerEntry(
            Vowels,
            "row",
            "toy_plugin.vowel_scorer:VowelScorer",
            direction="maximize",
            version=1,
            by_option=ByOption(str, default="share"),
            default_rule=">= 0.3",
        ),
    ),
    adapters=(
        AdapterSpec(  # like BitFit (https://arxiv.org/abs/2106.10199), for models without biases
            "norms",
            "norm tuning",
            trains=lambda _, name: "norm" in name,
            num_trainable=lambda _, parameters: parameters // 1000,
            learning_rate_factor=50,
            learning_rate_reason="norms: fifty times full fine-tuning's rate",
            unpackable_reason=lambda _: "norms belong to the base that a pack shares",
        ),
        AdapterSpec(
            "ia3",
            "IA3",
            trains=lambda _, name: "ia3_" in name,
            num_trainable=lambda _, parameters: parameters // 1000,
            config=Ia3Tuner,
            peft_config="toy_plugin:ia3_config",
            target_modules=lambda ia3: ia3.target_modules,
        ),
    ),
)
