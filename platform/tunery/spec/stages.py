"""The stages of an experiment, one frozen model a kind.

A stage names its inputs by the names of other stages (`inputs`), and gives one kind of artifact (`gives`): rows,
scored rows, a model, or metrics. Every field changes the stage's result and so belongs to its fingerprint; how it is
computed (workers, ZeRO stage, micro batches) is `Compute`, and does not.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

AUTO: Literal["auto"] = "auto"
Auto = Literal["auto"]
Gives = Literal["rows", "scored", "model", "metrics"]


class Spec(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


@dataclass(frozen=True)
class Input:
    """A reference from a stage's field (`path`, within the stage) to another stage, and what that stage may give."""

    path: tuple[str | int, ...]
    stage: str
    wants: tuple[Gives, ...]


class Scratch(Spec):
    """A new model with random weights, and a byte-level BPE tokenizer trained on the stage's rows."""

    scratch: Literal["tiny", "small"]
    """tiny: a Llama of about 1 M parameters, small: about 3 M (see models/scratch.py for the shapes)."""


class Pretrained(Spec):
    """A Hugging Face model: a local folder (relative to the experiment's file) or a hub name."""

    pretrained: str
    revision: str | None = None
    """Hub revision (a commit hash makes the experiment repeatable); not for folders."""

    @property
    def is_folder(self) -> bool:
        return self.pretrained.startswith(("/", "./", "../", "~"))

    @model_validator(mode="after")
    def _revision_is_for_hub_names(self) -> Pretrained:
        if self.revision is not None and self.is_folder:
            raise ValueError(f"a folder ({self.pretrained}) has no revision")
        return self


def _model_tag(value: object) -> str:
    """Which form of a model reference this is, so that an error speaks of the form that was meant."""
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

ROWS: tuple[Gives, ...] = ("rows", "scored")


ColumnRole = Literal[
    "text", "prompt", "input", "completion", "messages", "chosen", "rejected", "label", "system", "tools"
]


class Dataset(Spec):
    """Rows, read from a builtin corpus or from files, in one schema (store/rows.py)."""

    kind: Literal["dataset"]
    gives: ClassVar[Gives] = "rows"
    source: Annotated[str, Tag("text")] | Annotated[tuple[str, ...], Field(min_length=1), Tag("list")] = Field(
        discriminator=Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "text")
    )
    """`builtin:python-docs`; a path, a pattern or a folder, relative to the experiment's file or with s3:// or gs://;
    `hub:org/name`; or a list of these. Formats and shapes: docs/data.md."""
    format: Literal["jsonl", "json", "csv", "tsv", "xlsx", "parquet", "arrow", "text"] | None = None
    """Of all files of the source, where their endings don't tell it."""
    sample_by: Literal["line", "paragraph", "document"] | None = None
    """What is a row of a plain text; a line when not given, as in Hugging Face's text loader."""
    sheet: str | None = None
    """The sheet of Excel files to read; all when not given."""
    config: str | None = None
    """Of a hub dataset; may be left out where there is one, or one named default."""
    hub_split: str | None = None
    """Of a hub dataset, or of a saved DatasetDict; may be left out where there is one."""
    revision: str | None = None
    """Of a hub dataset: branch, tag or commit; the main branch when not given. Its commit is looked up in any case."""
    subset: Literal["texts", "questions", "preferences", "prompts"] | None = None
    """Which rows of a builtin source; files have none."""
    split: Literal["train", "validation", "test", "all"] = "all"
    """By a hash of what the row is about (the documented object; in files the first user turn, or the text)."""
    holdout: Annotated[float, Field(gt=0, le=0.45)] = 0.1
    """Share of the groups in validation, and as much again in test."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """At most so many rows, from the top."""
    corrupt: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Plant this share of bad rows, told apart in the column `planted` that no scorer reads: to judge a filter."""
    columns: dict[ColumnRole, str] | None = None
    """Names of the source's columns, where they are not recognised by themselves."""

    def inputs(self) -> Iterator[Input]:
        return iter(())


class Perplexity(Spec):
    """Perplexity of a row's answer given its question (of the whole text where there is no answer), by `perplexity`.

    Marion et al. 2023, "When Less is More" (https://arxiv.org/abs/2309.04564). Lower is better.
    """

    perplexity: Model


Scorer = Perplexity


class Score(Spec):
    """Every row gets scores; none is dropped."""

    kind: Literal["score"]
    gives: ClassVar[Gives] = "scored"
    data: str
    by: Annotated[tuple[Scorer, ...], Field(min_length=1, max_length=1)]
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens; what is longer is cut at the end, and counted."""

    def inputs(self) -> Iterator[Input]:
        yield Input(("data",), self.data, ROWS)
        for index, scorer in enumerate(self.by):
            yield from _model_inputs(("by", index, "perplexity"), scorer.perplexity)


class Keep(Spec):
    """One rule on one score. Which end is good belongs to the scorer (low for perplexity)."""

    quantile: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep this share, the best by the score."""
    threshold: float | None = None
    """Keep the rows at or on the good side of this score."""

    @model_validator(mode="after")
    def _one_rule(self) -> Keep:
        if (self.quantile is None) == (self.threshold is None):
            raise ValueError("give either `quantile` or `threshold`")
        return self


class Select(Spec):
    """The rows that pass every rule; the dropped ones are listed with the rule that dropped them."""

    kind: Literal["select"]
    gives: ClassVar[Gives] = "rows"
    data: str
    keep: Annotated[dict[str, Keep], Field(min_length=1)]

    def inputs(self) -> Iterator[Input]:
        yield Input(("data",), self.data, ("scored",))


class Lora(Spec):
    """Low-rank adaptation (Hu et al. 2021, https://arxiv.org/abs/2106.09685), by PEFT."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[float, Field(gt=0)] | Auto = AUTO
    """Scale of the update is alpha / rank; auto: 2 x rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: tuple[str, ...] | Auto = AUTO
    """auto: every linear layer but the head ("LoRA without regret", https://thinkingmachines.ai/blog/lora)."""


class LoraTuner(Spec):
    lora: Lora


Tuner = Annotated[
    Annotated[Literal["full"], Tag("full")] | Annotated[LoraTuner, Tag("lora")],
    Discriminator(lambda value: "full" if isinstance(value, str) else "lora"),
]


class Training(Spec):
    """What `pretrain` and `sft` have in common."""

    gives: ClassVar[Gives] = "model"
    data: str
    epochs: Annotated[float, Field(gt=0)] | Auto
    learning_rate: Annotated[float, Field(gt=0)] | Auto
    """Peak, of AdamW."""
    global_batch_size: Annotated[int, Field(ge=1)] | Auto = AUTO
    """Sequences per optimizer step, over all workers and accumulation steps."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens per sequence; longer answers are cut at the end, and counted."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Of the learning rate, after warm-up, down to zero."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of the steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    eval_data: str | None = None
    """Rows that the loss is measured on while training (and never trained on)."""
    evaluations: Annotated[int, Field(ge=1)] = 4
    """How often, evenly spread, the last one at the end."""
    seed: int | None = None
    """Of weights, data order and dropout; the experiment's when not given."""

    def inputs(self) -> Iterator[Input]:
        yield Input(("data",), self.data, ROWS)
        if self.eval_data is not None:
            yield Input(("eval_data",), self.eval_data, ROWS)


class Pretrain(Training):
    """Next-token prediction on whole texts, one after another, cut into blocks of `max_length`; new or continued."""

    kind: Literal["pretrain"]
    model: NewOrModel

    def inputs(self) -> Iterator[Input]:
        yield from super().inputs()
        yield from _model_inputs(("model",), self.model)


class Sft(Training):
    """Supervised fine-tuning on conversations: the loss counts the answer's tokens only."""

    kind: Literal["sft"]
    model: Model
    tuner: Tuner = "full"

    def inputs(self) -> Iterator[Input]:
        yield from super().inputs()
        yield from _model_inputs(("model",), self.model)


class Evaluate(Spec):
    """Loss (nats per token, answers only where there are answers) and perplexity of each model on each set."""

    kind: Literal["evaluate"]
    gives: ClassVar[Gives] = "metrics"
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    data: Annotated[dict[str, str], Field(min_length=1)]
    """Name of the set in the results: stage that gives its rows."""
    max_length: Annotated[int, Field(ge=8)] = 512

    def inputs(self) -> Iterator[Input]:
        for index, model in enumerate(self.models):
            yield from _model_inputs(("models", index), model)
        for name, stage in self.data.items():
            yield Input(("data", name), stage, ROWS)

    @field_validator("models")
    @classmethod
    def _distinct(cls, models: tuple[str | Pretrained, ...]) -> tuple[str | Pretrained, ...]:
        names = [model_name(model) for model in models]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"{', '.join(twice)} is named twice")
        return models


def _model_inputs(path: tuple[str | int, ...], model: str | Pretrained | Scratch) -> Iterator[Input]:
    if isinstance(model, str):
        yield Input(path, model, ("model",))


def model_name(model: str | Pretrained | Scratch) -> str:
    """What a model is called in results: its stage's name, or the last part of its folder or hub name."""
    if isinstance(model, str):
        return model
    if isinstance(model, Scratch):
        return f"scratch-{model.scratch}"
    return re.split(r"[/\\]", model.pretrained.rstrip("/\\"))[-1]


Stage = Annotated[Dataset | Score | Select | Pretrain | Sft | Evaluate, Field(discriminator="kind")]
"""One line a kind; a new kind is added here, in runner.STAGES, and in its room."""
