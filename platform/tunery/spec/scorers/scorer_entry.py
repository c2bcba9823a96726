"""Base configs of scorers, field types that several share, and the entry of a kind in the registry `SCORERS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from tunery.spec.plugins import load_object
from tunery.spec.references import Config, OutputType, Pretrained, StageRef, model_inputs

Count = Annotated[int, Field(ge=1)]
ResponseOrAll = Literal["response", "all"]
RowPart = Literal["response", "prompt", "all"]
"""Part of a row that is scored. response: the last message of a conversation; prompt: its user messages; all: all its
messages. For a text, response and all are the text, and there is no prompt. Rejected responses are not scored."""


class ScorerSpec(Config):
    """Config of a scorer. Its first field is its kind."""

    name: Annotated[str, Field(pattern="^[a-z][a-z0-9_]*$")] | None = None
    """Name of the score, if a stage has two of one kind; the kind when not given."""

    @classmethod
    def kind(cls) -> str:
        return next((field for field in cls.model_fields if field != "name"), "")

    @property
    def score(self) -> str:
        """The name of the score: the column in the table, and the key in `keep`."""
        return self.name or self.kind()

    @property
    def model(self) -> str | Pretrained | None:
        """The model of the scorer, if it needs one."""
        return None

    @property
    def returns_embeddings(self) -> bool:
        """Whether it stores vectors of the rows instead of a score."""
        return False

    def inputs(self) -> Iterator[StageRef]:
        """Stages that the scorer reads, by path within it."""
        yield from ()


class ModelScorerSpec(ScorerSpec):
    """Config of a scorer whose first field is a model."""

    model_stage: ClassVar[OutputType] = "model"
    """Output type of a stage that can be the model."""

    @property
    def model(self) -> str | Pretrained:
        model: str | Pretrained = getattr(self, self.kind())
        return model

    def inputs(self) -> Iterator[StageRef]:
        yield from model_inputs((self.kind(),), self.model, self.model_stage)


class ClassificationSpec(ModelScorerSpec):
    """Base of the scorers with a sequence-classification model.

    Conversations are rendered with its own chat template or, if it has none, as a pair of texts
    (models/classifier_inputs.py). Its hub revision or the content of its folder is part of the cache key.
    """

    model_stage: ClassVar[OutputType] = "classifier"


InputKind = Literal["row", "likelihood", "classification", "embedding", "across"]
"""Input of an implementation; scoring/scorers/interfaces.py has the interface of each.

row: its own content and the stages that the config names
likelihood: the likelihoods of its tokens under a causal language model
classification: the logits of a sequence-classification model
embedding: its embedding
across: comparison with the other rows
"""
MODEL_INPUT_KINDS: tuple[InputKind, ...] = ("likelihood", "classification", "embedding")
"""Input kinds that need a model: `config` is a ModelScorerSpec."""


@dataclass(frozen=True)
class ByOption:
    """The short form in `tunery filter --by KIND=VALUE`."""

    settings: Callable[[str], Any]
    """Converts the value to the first field of the config."""
    default: str | None = None
    """Value when none is given; None if one is required."""
    required: str = ""
    """Which value is required, for the error without one: "an ISO 639 code: `language=en`"."""
    takes_value: bool = True
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the config besides the first."""


@dataclass(frozen=True)
class ScorerEntry:
    """A kind of scorer."""

    config: type[ScorerSpec]
    input_kind: InputKind
    implementation: str
    """module:callable, imported on use."""
    direction: Literal["minimize", "maximize"]
    """Which scores are better: those that `keep_fraction` keeps; it also sets the sign of the AUC against corrupted
    rows."""
    version: int
    """Increased when the score of a row changes, which invalidates cached scores."""
    by_option: ByOption | str = ""
    """Short form in `--by`; if there is none, a description of the value to use instead."""
    default_rule: str = "best 80%"
    """Rule in `tunery filter` without `--keep`."""

    @property
    def kind(self) -> str:
        return self.config.kind()

    @property
    def needs_model(self) -> bool:
        return self.input_kind in MODEL_INPUT_KINDS

    @property
    def better(self) -> Literal["low", "high"]:
        """The direction as `prefer` in a rule names it."""
        return "low" if self.direction == "minimize" else "high"

    def load(self) -> Callable[..., Any]:
        implementation: Callable[..., Any] = load_object(self.implementation)
        return implementation
