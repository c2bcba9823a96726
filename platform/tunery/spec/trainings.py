"""Configs of trainings: the common fields, `pretrain`, `sft` and `classifier`. Trainings on preferences and rewards are
in feedback.py."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Annotated, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from tunery.spec.references import (
    AUTO,
    ROWS,
    Auto,
    Config,
    Model,
    ModelRef,
    NewOrModel,
    OutputType,
    Pretrained,
    Scratch,
    StageRef,
    model_inputs,
)
from tunery.spec.stage_config import StageConfig
from tunery.spec.tuners import FULL, Tuner


class PositiveNegative(Config):
    """Labels by stage: all rows of one stage are good, all rows of the other are bad.

    As in DataComp-LM (Li et al. 2024, https://arxiv.org/abs/2406.11794), whose classifier separates reference texts
    from web pages. A row's own label is not used.
    """

    good: str
    """Stage whose rows are good."""
    bad: str
    """Stage whose rows are bad."""

    @model_validator(mode="after")
    def _two(self) -> PositiveNegative:
        if self.good == self.bad:
            raise ValueError(f"`{self.good}` can't be both good and bad")
        return self


class ReviewLabels(Config):
    """Labels by a review: rows that the reviewer kept are good, dropped ones bad."""

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
"""A stage with labelled rows, `{good: stage, bad: stage}`, or `{review: stage}`."""


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
    """Return the stages that `data` refers to, by path within it."""
    if isinstance(data, str):
        return {(): data}
    if isinstance(data, dict):
        return {(stage,): stage for stage in data}
    return {(field,): getattr(data, field) for field in type(data).model_fields}


EmptyThinking = Literal["mask", "train"]
"""Whether the empty thinking block that a chat template puts before a response without reasoning (Qwen3's
`<think></think>`) is trained or belongs to the prompt."""
PairTruncation = Literal["left", "right", "drop"]
"""What happens to a prompt and response of more than `max_length` tokens. left: removes the oldest messages and the
beginning of the prompt, the same on both sides of a pair. right: the response loses its end. drop: the row is
unusable."""

OVERRIDABLE = ("learning_rate", "weight_decay")
"""Keys that can change during a training."""


class ScheduleOverride(Config):
    """Changes the learning rate or weight decay during a training."""

    after: Annotated[float, Field(gt=0, lt=1)]
    """Share of the steps after which it applies, rounded up to a step."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """New peak learning rate; the schedule keeps its shape."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """New weight decay."""

    @model_validator(mode="after")
    def _has_effect(self) -> ScheduleOverride:
        if self.learning_rate is None and self.weight_decay is None:
            raise ValueError("it has no effect: set `learning_rate` or `weight_decay`")
        return self


Data = TypeVar("Data")


class Training(StageConfig, Generic[Data]):
    """Keys of every training. `Data` is the type of `data`."""

    output_type: ClassVar[OutputType] = "model"
    warmup_offset: ClassVar[int] = 0
    """Steps that the warm-up starts ahead: with 0 its first step has a learning rate of 0 (training/schedule.py)."""
    data: Data
    """Rows to train on."""
    epochs: Annotated[float, Field(gt=0)] | Auto
    """Passes over the data; may be a fraction."""
    learning_rate: Annotated[float, Field(gt=0)] | Auto
    """Peak learning rate of AdamW."""
    global_batch_size: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Sequences per optimizer step, over all workers and accumulation steps; in `dpo` and `reward` pairs; in `grpo` and
    `rloo` responses; in `ppo` responses per step, which is divided into `minibatches`."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Maximum number of tokens of a sequence; at most the size of the model's position table, if it has one."""
    max_unusable: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the rows that may be left out because nothing in them can be trained (no response, too long, refused by
    the chat template). With more the stage fails before it trains."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning rate schedule after warm-up; cosine and linear decay to zero."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps with linear warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradient clipping by global norm."""
    schedule_overrides: tuple[ScheduleOverride, ...] = ()
    """Scheduled changes in order. `scheduler: pbt` writes them, so its winner is an ordinary training that can be run
    from the beginning."""
    eval_data: Data | None = None
    """Held-out rows to evaluate on during training."""
    num_evals: Annotated[int, Field(ge=1)] = 4
    """Number of evaluations, evenly spaced, the last one at the end."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of new weights, data order and dropout; the experiment's when not given."""
    kind: str
    model: str | Pretrained | Scratch
    """Initial model."""

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        shares = [override.after for override in self.schedule_overrides]
        if shares != sorted(set(shares)):
            raise ValueError(f"the `after` of `schedule_overrides` must increase, but they are {shares}")
        if isinstance(self.eval_data, dict):
            raise ValueError("`eval_data` must be one stage: the loss over a mixture would depend on its weights")
        return self

    def inputs(self) -> Iterator[StageRef]:
        for field in ("data", "eval_data"):
            if (data := getattr(self, field)) is not None:
                for path, stage in data_refs(data).items():
                    yield StageRef((field, *path), stage, ROWS)
        yield from model_inputs(("model",), self.model)

    def model_refs(self) -> Iterator[ModelRef]:
        yield ModelRef(("model",), self.model, "classifier" if self.output_type == "classifier" else "language_model")

    def eval_refs(self) -> Iterator[StageRef]:
        return (item for item in self.inputs() if item.path[0] == "eval_data")

    @property
    def uses_seed(self) -> bool:
        return True

    def metric_paths(self, metrics: Iterable[str]) -> Iterator[str]:
        return iter(()) if self.eval_data is None else iter(metrics)

    @property
    def sequences_per_row(self) -> int:
        """Sequences that a row gives in a step, such as sampled responses."""
        return 1

    @property
    def steps_per_batch(self) -> int:
        """Optimizer steps on each batch of sequences; all of them count as steps of the training."""
        return 1

    @property
    def num_minibatches(self) -> int:
        """Parts of a global batch, each with an optimizer step of its own; one pass over them counts as one step."""
        return 1

    @property
    def batch_size_multiple(self) -> int:
        """The number that the global batch size must be a multiple of."""
        return self.sequences_per_row * self.num_minibatches

    @property
    def num_frozen_models(self) -> int:
        """Frozen models in memory besides the trained ones, each about as large as the initial model. Only with full
        fine-tuning: adapters share the base model, which is loaded once."""
        return 0

    @property
    def plan_note(self) -> str:
        """Note on how the stage trains, for the plan; "" if there is nothing to add to the experiment file."""
        return ""


class Pretrain(Training[RowsOrMixture]):
    """Next-token prediction on concatenated texts, cut into blocks of `max_length`; on a new or existing model."""

    kind: Literal["pretrain"]
    model: NewOrModel
    """Initial model."""


class Sft(Training[RowsOrMixture]):
    """Supervised fine-tuning on conversations, with the loss on the responses only."""

    kind: Literal["sft"]
    model: Model
    """Initial model."""
    tuner: Tuner = FULL
    """Full fine-tuning or LoRA."""
    train_on: Literal["all_turns", "last_turn"] = "all_turns"
    """Trained turns: all assistant turns whose `weight` is not 0, or the last turn of each row."""
    truncate: Literal["right", "left", "drop", "split"] = "right"
    """Truncation of rows with more than `max_length` tokens. right: ends after the last response that fits; a single
    response loses its end. left: removes the oldest turns, then the beginning of the prompt. drop: the row is unusable.
    split: the remainder becomes further sequences."""
    empty_thinking: EmptyThinking = "mask"
    """Whether the empty thinking block that a chat template puts before a response without reasoning (Qwen3's
    `<think></think>`) is trained, or belongs to the prompt."""

    @property
    def plan_note(self) -> str:
        turns = "all assistant messages" if self.train_on == "all_turns" else "the last message of each row"
        return f"trains {turns} (train_on: {self.train_on})"


LABELS = ("bad", "good")
"""Labels of a classifier that was trained here, by number."""


class ClassifierTraining(Training[Labelled]):
    """A text classifier of good and bad rows: a new head on a model, trained with cross-entropy.

    As in FineWeb-Edu (Penedo et al. 2024, https://arxiv.org/abs/2406.17557): label a few rows, then filter any number
    with `{classifier: STAGE, label: good}`. Training and scorer give it the same input.
    """

    output_type: ClassVar[OutputType] = "classifier"
    kind: Literal["classifier"]
    model: Model
    """A language model, causal or not. It gets a head with random weights, unless it has one with two labels."""
    tuner: Tuner = FULL
    """Full fine-tuning or LoRA."""
    balanced: bool = True
    """true: each label has half of the loss, however rare it is, so that a probability of 0.5 separates the two. false:
    every row has the same weight, and probabilities reflect the frequency of the labels."""
