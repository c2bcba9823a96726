"""References from a stage to other stages and to pretrained models."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Tag, model_validator

AUTO: Literal["auto"] = "auto"
Auto = Literal["auto"]
OutputType = Literal["rows", "scored", "selected", "model", "classifier", "metrics"]
"""Type of a stage's output. classifier: a sequence-classification model; reward models are included."""
ROWS: tuple[OutputType, ...] = ("rows", "scored", "selected")


class Config(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        defer_build=True,  # to the first validation: the kinds of plugins belong to the schema (plugins.py)
    )


@dataclass(frozen=True)
class StageRef:
    """A reference from a field of a stage (`path`) to another stage, with the output types that the field accepts."""

    path: tuple[str | int, ...]
    stage: str
    accepts: tuple[OutputType, ...]


class Scratch(Config):
    """A new model with random weights, and a byte-level BPE tokenizer trained on the stage's rows."""

    scratch: Literal["tiny", "small"]
    """tiny: a Llama of about 1 M parameters; small: about 3 M."""


class Pretrained(Config):
    """A Hugging Face model: a local folder (relative to the experiment's file) or a hub name."""

    pretrained: str
    """Folder (starting with /, ./, ../ or ~) or hub name."""
    revision: str | None = None
    """Hub revision; a commit hash makes the experiment reproducible. Not for folders."""

    @property
    def is_folder(self) -> bool:
        return self.pretrained.startswith(("/", "./", "../", "~"))

    @model_validator(mode="after")
    def _revision_is_for_hub_names(self) -> Pretrained:
        if self.revision is not None and self.is_folder:
            raise ValueError(f"a folder ({self.pretrained}) has no revision")
        return self


def _model_tag(value: object) -> str:
    """Return the form of a model reference. A misspelled key is matched to the closest form, so that the error is about
    that form."""
    if isinstance(value, dict):
        near = [form for form in ("scratch", "pretrained") if difflib.get_close_matches(form, value, n=1)]
        return near[0] if near else "pretrained"
    if isinstance(value, Scratch):
        return "scratch"
    return "pretrained" if isinstance(value, Pretrained) else "stage"


Model = Annotated[Annotated[str, Tag("stage")] | Annotated[Pretrained, Tag("pretrained")], Discriminator(_model_tag)]
"""A stage's name, or `{pretrained: folder or hub name}`."""

NewOrModel = Annotated[
    Annotated[str, Tag("stage")] | Annotated[Pretrained, Tag("pretrained")] | Annotated[Scratch, Tag("scratch")],
    Discriminator(_model_tag),
]
"""The same, or `{scratch: tiny}`."""


class PythonReward(Config):
    """A Python function: `reward(prompts, responses)` gets two lists of texts and returns a list of numbers."""

    python: str
    """A .py file, relative to the experiment file; its content is part of the cache key."""
    function: str = "reward"
    """Name of the function."""


def _reward_tag(value: object) -> str:
    if isinstance(value, PythonReward) or (isinstance(value, dict) and {"python", "function"} & value.keys()):
        return "python"
    return "stage" if isinstance(value, str) else "pretrained"


RewardSource = Annotated[
    Annotated[str, Tag("stage")] | Annotated[Pretrained, Tag("pretrained")] | Annotated[PythonReward, Tag("python")],
    Discriminator(_reward_tag),
]
"""A `reward` stage, `{pretrained: ..}` with a sequence-classification model of one output, or `{python: file.py}`."""


@dataclass(frozen=True)
class ModelRef:
    """A reference from a stage's field (`path`, within the stage) to a model or a Python function."""

    path: tuple[str | int, ...]
    model: str | Pretrained | Scratch | PythonReward
    role: Literal["language_model", "classifier", "reward"]
    """language_model: its chat template renders the rows. classifier: a model with a classification head, or one that
    gets such a head; rows are plain text if its tokenizer has no chat template. reward: a classifier with one output,
    or a Python function."""


def reward_inputs(path: tuple[str | int, ...], reward: str | Pretrained | PythonReward) -> Iterator[StageRef]:
    """Yield the reference to the stage of a reward model, if a stage trains it."""
    if isinstance(reward, str):
        yield StageRef(path, reward, ("classifier",))


def model_inputs(
    path: tuple[str | int, ...], model: str | Pretrained | Scratch, output: OutputType = "model"
) -> Iterator[StageRef]:
    """Yield the reference to the stage of a model, if a stage trains it."""
    if isinstance(model, str):
        yield StageRef(path, model, (output,))


def model_name(model: str | Pretrained | Scratch) -> str:
    """Return the name of a model in results: its stage name, the last part of its folder or hub name, or
    `scratch-<size>`."""
    if isinstance(model, str):
        return model
    if isinstance(model, Scratch):
        return f"scratch-{model.scratch}"
    return re.split(r"[/\\]", model.pretrained.rstrip("/\\"))[-1]
