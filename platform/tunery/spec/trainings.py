"""The stages that train a model, one frozen model a kind: what all have in common, and those that learn from rows as
they are. Those that learn from preferences and rewards stand in feedback.py."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from tunery.spec.references import (
    AUTO,
    ROWS,
    Auto,
    Config,
    Gives,
    Model,
    NewOrModel,
    Pretrained,
    Scratch,
    StageRef,
    model_inputs,
)


class Lora(Config):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685), by PEFT."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] | Auto = AUTO
    """Scale of the update is alpha / rank; auto: 2 x rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | Auto = AUTO
    """Names of layers, or what their full names end in; a name that matches none is refused. auto: every linear layer
    but the head ("LoRA without regret", https://thinkingmachines.ai/blog/lora). The output head can't be named, nor
    the embedding where it shares the head's weight: merging the adapter would change both."""


class LoraTuner(Config):
    lora: Lora


Tuner = Annotated[
    Annotated[Literal["full"], Tag("full")] | Annotated[LoraTuner, Tag("lora")],
    Discriminator(lambda value: "full" if isinstance(value, str) else "lora"),
]


class PositiveNegative(Config):
    """Two stages in place of labels: all rows of one are good, all of the other bad.

    As in DataComp-LM (Li et al. 2024, https://arxiv.org/abs/2406.11794), whose classifier tells wanted texts from web
    pages. A row's own label is not looked at.
    """

    good: str
    bad: str

    @model_validator(mode="after")
    def _two(self) -> PositiveNegative:
        if self.good == self.bad:
            raise ValueError(f"`{self.good}` can't be good and bad")
        return self


class ReviewLabels(Config):
    """The rows that a person decided on: kept ones are good, dropped ones bad."""

    review: str
    """A `review` stage."""


Labelled = Annotated[
    Annotated[str, Tag("stage")]
    | Annotated[PositiveNegative, Tag("contrast")]
    | Annotated[ReviewLabels, Tag("decisions")],
    Discriminator(
        lambda value: (
            "decisions"
            if isinstance(value, ReviewLabels) or (isinstance(value, dict) and "review" in value)
            else "contrast"
            if isinstance(value, PositiveNegative | dict)
            else "stage"
        )
    ),
]
"""A stage whose rows bear labels, `{good: stage, bad: stage}`, or `{review: stage}`."""


def _has_weight(mixture: dict[str, float]) -> dict[str, float]:
    if not any(mixture.values()):
        raise ValueError("all weights of the mixture are 0")
    return mixture


RowsOrMixture = Annotated[
    Annotated[str, Tag("stage")]
    | Annotated[
        dict[str, Annotated[float, Field(ge=0)]], Field(min_length=1), AfterValidator(_has_weight), Tag("mixture")
    ],
    Discriminator(lambda value: "mixture" if isinstance(value, dict) else "stage"),
]
"""A stage, or `{stage: weight, ..}`: sequences are sampled from several stages by these weights (their sum is any
number). An epoch has as many sequences as all of them together, so a stage with a large weight is repeated within it.
"""


def data_refs(data: str | PositiveNegative | ReviewLabels | dict[str, float]) -> dict[tuple[str, ...], str]:
    """The stages that `data` names, by path within it."""
    if isinstance(data, str):
        return {(): data}
    if isinstance(data, dict):
        return {(stage,): stage for stage in data}
    return {(field,): getattr(data, field) for field in type(data).model_fields}


EmptyThinking = Literal["mask", "train"]
"""Whether the empty thinking block that a chat template puts before a response without reasoning (Qwen3's
`<think></think>`) is trained or belongs to the prompt."""
PairTruncation = Literal["left", "right", "drop"]
"""What happens to a prompt and response of more than `max_length` tokens. left: the oldest turns and the beginning of
the prompt go, the same of both sides of a pair. right: the response loses its end. drop: the row is unusable."""

OVERRIDABLE = ("learning_rate", "weight_decay")
"""What a training can change in its course."""


class ScheduleOverride(Config):
    """Other values in the course of a training."""

    after: Annotated[float, Field(gt=0, lt=1)]
    """Share of its steps; rounded up to a whole one."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """Another peak: the schedule keeps its shape."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _something(self) -> ScheduleOverride:
        if self.learning_rate is None and self.weight_decay is None:
            raise ValueError("it changes nothing: give `learning_rate` or `weight_decay`")
        return self


Data = TypeVar("Data")


class Training(Config, Generic[Data]):
    """What all trainings have in common. `Data` is how they name what they learn from."""

    gives: ClassVar[Gives] = "model"
    metrics: ClassVar[tuple[str, ...]] = ("eval_loss",)
    """What is measured on `eval_data`."""
    data: Data
    epochs: Annotated[float, Field(gt=0)] | Auto
    learning_rate: Annotated[float, Field(gt=0)] | Auto
    """Peak, of AdamW."""
    global_batch_size: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Sequences per optimizer step, over all workers and accumulation steps; in `ppo` answers per step, gone over in
    `minibatches`."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens per sequence. At most as many as the model has positions for, where those are a table."""
    max_unusable: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the rows that may be left out because nothing in them can be trained on (no response, too long, refused
    by the chat template). The stage fails when there are more, before it trains."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Of the learning rate, after warm-up, down to zero."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    schedule_overrides: tuple[ScheduleOverride, ...] = ()
    """In their order. A search by population (`scheduler: pbt`) writes them: what it finds is a training like any
    other, and can be run again from its beginning."""
    eval_data: Data | None = None
    """Rows that the loss is measured on while training (and never trained on)."""
    num_evals: Annotated[int, Field(ge=1)] = 4
    """How often, evenly spread, the last one at the end."""
    seed: int | None = None
    """Of weights, data order and dropout; the experiment's when not given."""
    kind: str
    model: str | Pretrained | Scratch
    """What the training begins with; which of these, each kind says."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        shares = [change.after for change in self.schedule_overrides]
        if shares != sorted(set(shares)):
            raise ValueError(f"`schedule_overrides` come one after another, but their `after` are {shares}")
        if isinstance(self.eval_data, dict):
            raise ValueError("`eval_data` is one stage: a loss over a mixture would depend on its weights")
        return self

    def inputs(self) -> Iterator[StageRef]:
        for field in ("data", "eval_data"):
            if (data := getattr(self, field)) is not None:
                for path, stage in data_refs(data).items():
                    yield StageRef((field, *path), stage, ROWS)
        yield from model_inputs(("model",), self.model)


class Pretrain(Training[RowsOrMixture]):
    """Next-token prediction on whole texts, one after another, cut into blocks of `max_length`; new or continued."""

    kind: Literal["pretrain"]
    model: NewOrModel


class Sft(Training[RowsOrMixture]):
    """Supervised fine-tuning on conversations: the loss counts the responses' tokens only."""

    kind: Literal["sft"]
    model: Model
    tuner: Tuner = "full"
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    """Which assistant turns are trained: all whose `weight` is not 0, or the last turn of each row."""
    truncate: Literal["right", "left", "drop", "split"] = "right"
    """What happens to a row of more than `max_length` tokens. right: it ends after the last response that fits; a
    single response loses its end. left: it loses its oldest turns, then the beginning of its prompt. drop: it is
    unusable. split: what is cut off becomes further sequences."""
    empty_thinking: EmptyThinking = "mask"


LABELS = ("bad", "good")
"""What a classifier that was trained here tells apart, by number."""


class ClassifierTraining(Training[Labelled]):
    """A text classifier that tells good rows from bad ones: a new head on a model, trained to cross-entropy.

    As in FineWeb-Edu (Penedo et al. 2024, https://arxiv.org/abs/2406.17557): a few labels, and then any number of rows
    filtered by `{classifier: STAGE, label: good}`. A row is shown to it as to the scorer (models/classifier_inputs.py).
    """

    gives: ClassVar[Gives] = "classifier"
    metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_accuracy", "eval_auc")
    kind: Literal["classifier"]
    model: Model
    """A language model, causal or not: it gets a head with random weights, unless it has one of two labels."""
    tuner: Tuner = "full"
    balanced: bool = True
    """Each label has half of the loss, however few of the rows have it: then 0.5 is between more like the good and
    more like the bad ones. False: every row counts the same, and probabilities know how frequent the labels are."""
