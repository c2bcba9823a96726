"""The stages of an experiment, one frozen model a kind.

A stage names its inputs by the names of other stages (`inputs`), and gives one kind of artifact (`gives`): rows,
scored rows, selected rows, a model, or metrics. Every field changes the stage's result and so belongs to its
fingerprint; how it is computed (workers, ZeRO stage, micro batches) is `Compute`, and does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal, get_args

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from tunery.spec.augment import Augment
from tunery.spec.feedback import Dpo, Grpo, Kto, Ppo, RewardSource, RewardTraining, Rloo, Sampling, reward_inputs
from tunery.spec.references import ROWS, Config, Gives, Model, Pretrained, StageRef, model_inputs, model_name
from tunery.spec.scorers import Scorer
from tunery.spec.trainings import ClassifierTraining, Pretrain, Sft, Training

ColumnRole = Literal[
    "text",
    "prompt",
    "input",
    "completion",
    "reasoning_content",
    "history",
    "messages",
    "chosen",
    "rejected",
    "label",
    "system",
    "tools",
]
MessageRole = Literal["system", "user", "assistant", "tool"]
MessageKey = Literal["role", "content", "tool_calls", "reasoning_content", "weight", "name", "tool_call_id"]


def role_name(name: object) -> str:
    """A role as files have it, without differences of case and of surrounding white space."""
    return str(name).strip().casefold()


class Dataset(Config):
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
    subset: Literal["texts", "questions", "preferences", "damaged", "prompts"] | None = None
    """Which rows of a builtin source; files have none."""
    split: Literal["train", "validation", "test", "all"] = "all"
    """By a hash of what the row is about (the documented object; in files the first user turn, or the text)."""
    eval_fraction: Annotated[float, Field(gt=0, le=0.45)] = 0.1
    """Share of the groups in validation, and as much again in test."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """At most so many rows, from the top."""
    corrupt_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Plant this share of bad rows, told apart in the column `planted` that no scorer reads: to judge a filter."""
    columns: dict[ColumnRole, str] | None = None
    """Names of the source's columns, where they are not recognised by themselves."""
    roles: Annotated[dict[str, MessageRole], Field(min_length=1)] | None = None
    """What the source's own names of roles mean, besides those that are recognised: {customer: user, agent: assistant}.
    Compared without regard to case and surrounding white space."""
    message_keys: Annotated[dict[MessageKey, str], Field(min_length=1)] | None = None
    """Names of the keys of a message, where they are not recognised by themselves: {role: speaker, content: line}."""

    def inputs(self) -> Iterator[StageRef]:
        return iter(())

    @field_validator("roles")
    @classmethod
    def _one_meaning_per_role(cls, roles: dict[str, MessageRole] | None) -> dict[str, MessageRole] | None:
        names = [role_name(name) for name in roles or ()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the role {', '.join(twice)} has two meanings: case and white space make no other role")
        return roles


RANDOM = "random"
"""A score that every row has: evenly spread over [0, 1), from the row's id and the stage's seed."""


class Score(Config):
    """Every row gets scores; none is dropped."""

    kind: Literal["score"]
    gives: ClassVar[Gives] = "scored"
    data: str
    by: Annotated[tuple[Scorer, ...], Field(min_length=1)]
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens; what is longer is cut at the end, and counted."""

    def inputs(self) -> Iterator[StageRef]:
        yield StageRef(("data",), self.data, ROWS)
        for index, scorer in enumerate(self.by):
            for item in scorer.inputs():
                yield StageRef(("by", index, *item.path), item.stage, item.wants)

    @field_validator("by")
    @classmethod
    def _distinct(cls, by: tuple[Scorer, ...]) -> tuple[Scorer, ...]:
        names = [scorer.score for scorer in by]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two scores are called {', '.join(twice)}: give one of them a `name`")
        if taken := sorted({RANDOM, "id", "known", "lost"} & set(names)):
            raise ValueError(f"a score can't be called {', '.join(taken)}: that stands in every table")
        return by


class Keep(Config):
    """One rule on one score. Rows without a score never pass, save by `keep_fraction: 1`."""

    keep_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep this share of all rows, the best by the score; of rows at the cut those that come first."""
    top_k: Annotated[int, Field(gt=0)] | None = None
    """Keep so many rows, the best by the score."""
    match_count_of: str | None = None
    """Keep as many rows, the best by the score, as another stage has: with `random`, its control."""
    keep_fraction_of_rest: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep this share of the rows that have this score and pass every rule without `keep_fraction_of_rest`, the best by
    the score: `keep_fraction` counts all rows, whatever the other rules drop."""
    threshold: float | None = None
    """Keep the rows at or on the good side of this score."""
    range: Annotated[tuple[float | None, float | None], Field(min_length=2, max_length=2)] | None = None
    """Keep the rows from the one to the other score, both included; null leaves an end open."""
    prefer: Literal["low", "high"] | None = None
    """Which end of the score is the good one; else the scorer's own (low for perplexity, high for language)."""

    @model_validator(mode="after")
    def _one_rule(self) -> Keep:
        given = [name for name in KEEP_RULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of {', '.join(f'`{name}`' for name in KEEP_RULES)}")
        if self.range is not None:
            low, high = self.range
            if low is None and high is None:
                raise ValueError("both ends of the range are open")
            if low is not None and high is not None and low > high:
                raise ValueError(f"the range ends ({high:g}) before it begins ({low:g})")
            if self.prefer is not None:
                raise ValueError("a range has no good end: remove `prefer`")
        return self


KEEP_RULES = ("keep_fraction", "top_k", "match_count_of", "keep_fraction_of_rest", "threshold", "range")


class Quota(Config):
    """At most so many rows of each source or group, the best by a score (those that come first where none is named)."""

    group_by: Literal["source", "group"]
    rows: Annotated[int, Field(gt=0)]
    by: str | None = None


class Diverse(Config):
    """Few rows that stand for all: chosen by how alike they are, as the cosine of their embeddings has it."""

    by: str
    """A score of kind `embedding` without `reference`: it keeps the rows' vectors."""
    method: Literal["k_center", "score_first"]
    """k_center: the row farthest from those that are kept, again and again (Gonzalez 1985,
    https://doi.org/10.1016/0304-3975(85)90224-5; Sener & Savarese 2018, https://arxiv.org/abs/1708.00489): no choice
    of as many rows leaves the worst one less than half as far from a kept one. Likes outliers: filter first.
    score_first: best score first, less what is too similar to a row kept before (Liu et al. 2024, DEITA,
    https://arxiv.org/abs/2312.15685)."""
    rows: Annotated[int, Field(gt=0)] | None = None
    """At most so many. Fewer where all others equal a kept one (k_center) or are too similar to one (score_first)."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a share of the rows that pass `keep` and `quota`."""
    score: str | None = None
    """Which rows come first, in score_first; of equal ones those that come first in the data."""
    prefer: Literal["low", "high"] | None = None
    """Which end of the score comes first; else the scorer's own."""
    similarity: Annotated[float, Field(gt=-1, le=1)] | None = None
    """Cosine from above which rows are too similar, in score_first; 0.9 (DEITA's) when not given. What is high depends
    on the model: the facts tell how similar rows are by chance."""

    @model_validator(mode="after")
    def _fields_of_its_method(self) -> Diverse:
        if self.rows is not None and self.share is not None:
            raise ValueError("give one of `rows`, `share`")
        if self.method == "k_center":
            if self.rows is None and self.share is None:
                raise ValueError("k_center needs `rows` or `share`")
            if given := [name for name in ("score", "prefer", "similarity") if getattr(self, name) is not None]:
                raise ValueError(f"k_center looks at distances alone: remove `{given[0]}`, or take score_first")
        elif self.score is None:
            raise ValueError("score_first needs a `score`; `random` is always there")
        return self


class Select(Config):
    """The rows that pass; the dropped ones are listed with the rule that dropped them."""

    kind: Literal["select"]
    gives: ClassVar[Gives] = "selected"
    data: str
    keep: dict[str, Keep] = Field(default_factory=dict)
    """By score. Each rule looks at all rows, whatever the others drop (but for `keep_fraction_of_rest`). May be left
    out where there is a `quota` or `diverse`."""
    combine: Literal["all", "any"] = "all"
    """A row passes when all rules keep it, or any of them."""
    quota: Quota | None = None
    """Applied to the rows that pass."""
    diverse: Diverse | None = None
    """Applied last, to the rows that pass both, so that what is kept is as many rows as it says."""
    seed: int | None = None
    """Of the score `random`, and of the random choice that `diverse` is told beside; the experiment's when not
    given."""

    @model_validator(mode="after")
    def _keeps_by_something(self) -> Select:
        if not self.keep and self.quota is None and self.diverse is None:
            raise ValueError("it keeps all rows: give `keep`, `quota` or `diverse`")
        if self.combine == "any" and any(rule.keep_fraction_of_rest is not None for rule in self.keep.values()):
            raise ValueError(
                "`keep_fraction_of_rest` counts rows that pass the other rules: with `combine: any` use `keep_fraction`"
            )
        return self

    @property
    def ranked_by(self) -> tuple[str, ...]:
        """Scores that rows are compared by, each once."""
        others = (self.quota and self.quota.by, self.diverse and self.diverse.score)
        return tuple(dict.fromkeys([*self.keep, *(score for score in others if score)]))

    def inputs(self) -> Iterator[StageRef]:
        yield StageRef(("data",), self.data, ROWS)
        for score, rule in self.keep.items():
            if rule.match_count_of is not None:
                yield StageRef(("keep", score, "match_count_of"), rule.match_count_of, ROWS)


class Review(Config):
    """A person's decisions on rows near the cut of a `select` stage, which beat the filter's."""

    kind: Literal["review"]
    gives: ClassVar[Gives] = "rows"
    data: str
    decisions: str
    """A .jsonl file, as `tunery review` writes it, or an .xlsx one, relative to the experiment's file. It may be
    missing until somebody has decided: its content belongs to the fingerprint, as a dataset's does."""
    rows: Annotated[int, Field(gt=0)] = 100
    """To look at: half of them on either side of the cut. 100 tell an agreement of 80% to within 8 points (one
    standard error is 4), and take a person about half an hour."""

    def inputs(self) -> Iterator[StageRef]:
        yield StageRef(("data",), self.data, ("selected",))

    @field_validator("decisions")
    @classmethod
    def _known_ending(cls, decisions: str) -> str:
        if not decisions.endswith((".jsonl", ".xlsx")):
            raise ValueError("it should end in .jsonl or .xlsx")
        return decisions


def _named_once(models: tuple[str | Pretrained, ...]) -> tuple[str | Pretrained, ...]:
    names = [model_name(model) for model in models]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(twice)} is named twice")
    return models


class Evaluate(Config):
    """Loss (nats per token, answers only where there are answers) and perplexity of each model on each set."""

    kind: Literal["evaluate"]
    gives: ClassVar[Gives] = "metrics"
    models: Annotated[tuple[Model, ...], Field(min_length=1), AfterValidator(_named_once)]
    data: Annotated[dict[str, str], Field(min_length=1)]
    """Name of the set in the results: stage that gives its rows."""
    baseline: Model | None = None
    """One of `models`. Results then say how much of it each other model has forgotten: by what share its loss on the
    set is above the baseline's."""
    max_length: Annotated[int, Field(ge=8)] = 512

    def inputs(self) -> Iterator[StageRef]:
        for index, model in enumerate(self.models):
            yield from model_inputs(("models", index), model)
        for name, stage in self.data.items():
            yield StageRef(("data", name), stage, ROWS)
        if self.baseline is not None:
            yield from model_inputs(("baseline",), self.baseline)

    @model_validator(mode="after")
    def _baseline_is_measured(self) -> Evaluate:
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"the baseline `{model_name(self.baseline)}` is not among `models`: add it")
        return self


class WinRate(Config):
    """Answers of several models to the same prompts, rated by a reward model: how often each beats the baseline's.

    Judge by another reward model than the one that was trained against: a policy learns that one's mistakes too (Gao
    et al. 2022, https://arxiv.org/abs/2210.10760).
    """

    kind: Literal["win_rate"]
    gives: ClassVar[Gives] = "metrics"
    models: Annotated[tuple[Model, ...], Field(min_length=1), AfterValidator(_named_once)]
    baseline: Model
    """The baseline; not among `models`."""
    judge: RewardSource
    data: str
    """The prompts: of conversations and preference pairs all that comes before the answer."""
    sampling: Sampling = Sampling()
    max_length: Annotated[int, Field(ge=8)] = 512
    """Tokens of prompt and answer; a prompt that leaves no room for `sampling.max_new_tokens` is left out, and
    counted."""
    seed: int | None = None
    """Of the draws; the experiment's when not given."""

    def inputs(self) -> Iterator[StageRef]:
        for index, model in enumerate(self.models):
            yield from model_inputs(("models", index), model)
        yield from model_inputs(("baseline",), self.baseline)
        yield from reward_inputs(("judge",), self.judge)
        yield StageRef(("data",), self.data, ROWS)

    @property
    def contestants(self) -> tuple[str | Pretrained, ...]:
        """The baseline, then the others."""
        return self.baseline, *self.models

    @model_validator(mode="after")
    def _against_another(self) -> WinRate:
        if self.baseline in self.models:
            raise ValueError(f"`{model_name(self.baseline)}` would be compared with itself: remove it from `models`")
        _named_once(self.contestants)  # they stand side by side in the results
        self.sampling.check_room(self.max_length)
        return self


Stage = Annotated[
    Dataset
    | Score
    | Select
    | Review
    | Augment
    | Pretrain
    | Sft
    | ClassifierTraining
    | RewardTraining
    | Dpo
    | Kto
    | Grpo
    | Rloo
    | Ppo
    | Evaluate
    | WinRate,
    Field(discriminator="kind"),
]
"""One line a kind; a new kind is added here, in runner.STAGES, and in its room."""

TRAININGS: tuple[str, ...] = tuple(
    get_args(stage.model_fields["kind"].annotation)[0]
    for stage in get_args(get_args(Stage)[0])
    if issubclass(stage, Training)
)
"""The kinds that train."""
