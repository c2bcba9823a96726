"""Configs of `tuner`, and the registry `ADAPTERS` with everything that other packages need to know about a kind.

A tuner without settings is its name, `full`; one with settings is a mapping whose key names it: `{lora: {rank: 8}}`. A
new tuner: its settings, config and entry here, and a function that builds its PEFT config in models/adapters.py.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import Field

from tunery.spec.plugins import KindUnion, Registry, load_object
from tunery.spec.references import AUTO, Auto, Config

FULL: Literal["full"] = "full"


class TunerSpec(Config):
    """Config of a tuner with settings. Its only field is its kind."""

    @classmethod
    def kind(cls) -> str:
        return next(iter(cls.model_fields), "")


class Lora(Config):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685), by PEFT."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of the update."""
    alpha: Annotated[float, Field(gt=0)] | Auto = AUTO
    """The update is scaled by alpha / rank. auto: 2 x rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the adapter's input. Trials with dropout do not train in packs."""
    target_modules: tuple[str, ...] | Auto = AUTO
    """Names of layers, or ends of their full names; a name without a match is an error. auto: every linear layer except
    the head ("LoRA without regret", https://thinkingmachines.ai/blog/lora). Not allowed are the output head, and the
    embedding if it shares the head's weight: merging the adapter would change both."""


class LoraTuner(TunerSpec):
    """Trains a LoRA adapter instead of all weights."""

    lora: Lora
    """Settings of the adapter."""


def _no_target_modules(_: Any) -> tuple[str, ...]:
    return ()


def _not_low_rank(_: Any) -> str:
    return "a pack trains LoRA only"


@dataclass(frozen=True)
class AdapterSpec:
    """A kind of tuner. Functions get its settings: the value of the config's field, None for a kind without."""

    kind: str
    title: str
    """Name in messages."""
    trains: Callable[[Any, str], bool]
    """(settings, name of a parameter) -> whether the method trains it. With `peft_config`: whether it belongs to the
    adapter."""
    num_trainable: Callable[[Any, int], int]
    """(settings, parameters of the model) -> trained parameters, as an estimate for the plan, which does not read
    models."""
    config: type[TunerSpec] | None = None
    """None: the kind has no settings."""
    peft_config: str = ""
    """module:callable, imported on use: (settings, PEFT's task type, names of modules with new weights) -> PEFT config.
    The base model stays as it is, and the adapter is saved. Without it the method trains some or all of the model's own
    parameters (`trains`), and the complete model is saved."""
    version: int = 1
    """Increased when the same settings train another model: part of the cache key of stages, except 1."""
    learning_rate_factor: float = 1.0
    """`learning_rate: auto`, relative to full fine-tuning."""
    learning_rate_reason: str = ""
    """Why, if the factor is not 1; the plan reports it."""
    target_modules: Callable[[Any], tuple[str, ...]] = _no_target_modules
    """Layers that the settings name in `target_modules`, which are checked against the model before a run."""
    unpackable_reason: Callable[[Any], str] = _not_low_rank
    """Why trials can't train in a pack, which applies low-rank matrices to a shared base; "" if they can."""
    mergeable: bool = True
    """Whether PEFT can merge the adapter into its base, as every use of a trained model requires."""
    peft_fields: Mapping[str, str] = field(default_factory=dict)
    """Fields of PEFT's config that hold the value of a setting with `auto`, by setting."""

    @property
    def has_adapter(self) -> bool:
        """Whether the method adds weights to a base that it leaves as it is."""
        return bool(self.peft_config)

    def build_peft_config(self, settings: Any, task: str, new_modules: list[str]) -> Any:
        return load_object(self.peft_config)(settings, task, new_modules)


def _lora_parameters(lora: Lora, parameters: int) -> int:
    """Estimate 2 r / width of the model's parameters, for a width of sqrt(parameters / 100)."""
    return min(parameters, round(parameters * 2 * lora.rank / max(1.0, math.sqrt(parameters / 100))))


def _lora_targets(lora: Lora) -> tuple[str, ...]:
    return () if isinstance(lora.target_modules, str) else lora.target_modules


def _unpackable_lora(lora: Lora) -> str:
    return "LoRA's dropout would be drawn for all members together" if lora.dropout else ""


ADAPTERS: Registry[AdapterSpec] = Registry(
    "adapters",
    AdapterSpec,
    [
        AdapterSpec(
            FULL,
            "full fine-tuning",
            trains=lambda _, name: True,
            num_trainable=lambda _, parameters: parameters,
            unpackable_reason=lambda _: "full fine-tuning changes the base that a pack shares",
        ),
        AdapterSpec(
            "lora",
            "LoRA",
            trains=lambda _, name: "lora_" in name,
            num_trainable=_lora_parameters,
            config=LoraTuner,
            peft_config="tunery.models.adapters:lora_config",
            learning_rate_factor=10,  # https://thinkingmachines.ai/blog/lora
            learning_rate_reason="LoRA: ten times full fine-tuning's rate",
            target_modules=_lora_targets,
            unpackable_reason=_unpackable_lora,
            peft_fields={"alpha": "lora_alpha", "target_modules": "target_modules"},
        ),
    ],
)
"""Every kind of tuner."""


def _tuner_tag(value: Any) -> str:
    """Return the kind that is meant, so that an error is about that one."""
    if isinstance(value, TunerSpec):
        return value.kind()
    if isinstance(value, dict):
        with_settings = [kind for kind, entry in ADAPTERS.items() if entry.config is not None]
        given = [str(key) for key in value]
        near = [kind for key in given for kind in difflib.get_close_matches(key, with_settings, n=1)]
        return next((key for key in given if key in with_settings), (near or given or [""])[0])
    # A name without settings is another tag than the kind, so that the error says how to write it.
    entry = ADAPTERS.get(value) if isinstance(value, str) else None
    return value if entry is not None and entry.config is None else f"{value} without settings"


def _tuners_by_tag() -> dict[str, Any]:
    return {kind: Literal[kind] if entry.config is None else entry.config for kind, entry in ADAPTERS.items()}


Tuner = Annotated[TunerSpec | str, KindUnion(_tuners_by_tag, _tuner_tag)]


def tuner_of(stage: Any) -> TunerSpec | str:
    """Return the tuner of a training; all weights are trained in a kind that has no such key."""
    tuner: TunerSpec | str = getattr(stage, "tuner", FULL)
    return tuner


def adapter_spec(tuner: TunerSpec | str) -> AdapterSpec:
    return ADAPTERS[tuner if isinstance(tuner, str) else tuner.kind()]


def settings_of(tuner: TunerSpec | str) -> Any:
    return None if isinstance(tuner, str) else getattr(tuner, tuner.kind())
