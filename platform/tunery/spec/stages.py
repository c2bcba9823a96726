"""Configs of the stages that read, score, select and review rows or evaluate models, one class per kind.

A stage refers to its input stages by name (`inputs`) and has one output type (`output_type`): rows, scored rows,
selected rows, a model or metrics. Fields change the result and are part of the fingerprint (exceptions in
pipeline/cache_keys.py); settings that do not (workers, ZeRO stage, micro batches) are in `Compute`. Stages that train
are in trainings.py and feedback.py, `augment` in augment.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, ClassVar, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, field_validator, model_validator

from tunery.spec.feedback import Sampling
from tunery.spec.references import (
    ROWS,
    Config,
    Model,
    ModelRef,
    OutputType,
    Pretrained,
    RewardSource,
    StageRef,
    model_inputs,
    model_name,
    reward_inputs,
)
from tunery.spec.scorers import SCORERS, Scorer
from tunery.spec.stage_config import StageConfig

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
    """Normalize a role name of a file: case and surrounding white space are ignored."""
    return str(name).strip().casefold()


class Dataset(StageConfig):
    """Reads rows from files, hub datasets or the builtin corpus into one schema."""

    kind: Literal["dataset"]
    output_type: ClassVar[OutputType] = "rows"
    source: Annotated[str, Tag("text")] | Annotated[tuple[str, ...], Field(min_length=1), Tag("list")] = Field(
        discriminator=Discriminator(lambda value: "list" if isinstance(value, list | tuple) else "text")
    )
    """`builtin:python-docs`; a file, pattern or folder, relative to the experiment file or with s3:// or gs://;
    `hub:org/name`; or a list of these. Formats and column patterns: docs/data.md."""
    format: Literal["jsonl", "json", "csv", "tsv", "xlsx", "parquet", "arrow", "text"] | None = None
    """Format of all files of the source; by their extensions when not given."""
    sample_by: Literal["line", "paragraph", "document"] | None = None
    """Unit of a row in plain text files; a line when not given, as in Hugging Face's text loader."""
    sheet: str | None = None
    """Sheet of Excel files to read; all sheets when not given."""
    config: str | None = None
    """Configuration of a hub dataset; optional if it has only one, or one named default."""
    hub_split: str | None = None
    """Split of a hub dataset or of a saved DatasetDict; optional if it has only one."""
    revision: str | None = None
    """Branch, tag or commit of a hub dataset; the main branch when not given. The cache key contains the commit."""
    subset: Literal["texts", "questions", "preferences", "corrupted", "prompts"] | None = None
    """Subset of the builtin corpus; not for files."""
    split: Literal["train", "validation", "test", "all"] = "all"
    """Split by a hash of the row's group: the first user message, or the text (in the builtin corpus: the documented
    object)."""
    eval_fraction: Annotated[float, Field(gt=0, le=0.45)] = 0.1
    """Share of the groups in `validation`, and again in `test`."""
    limit: Annotated[int, Field(gt=0)] | None = None
    """Maximum number of rows; reading stops there."""
    corrupt_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Corrupts this share of the rows, to evaluate a filter. The column `injected_corruption` records the kind of each
    row; no scorer reads it."""
    columns: dict[ColumnRole, str] | None = None
    """Column names of the source by role, if they are not recognised. Then only these columns are read."""
    roles: Annotated[dict[str, MessageRole], Field(min_length=1)] | None = None
    """Additional role names of messages, for example {customer: user, agent: assistant}. Case and surrounding white
    space are ignored."""
    message_keys: Annotated[dict[MessageKey, str], Field(min_length=1)] | None = None
    """Keys of messages, if they are not recognised, for example {role: speaker, content: line}."""

    def inputs(self) -> Iterator[StageRef]:
        return iter(())

    @property
    def uses_seed(self) -> bool:
        return self.corrupt_fraction > 0

    @field_validator("roles")
    @classmethod
    def _one_meaning_per_role(cls, roles: dict[str, MessageRole] | None) -> dict[str, MessageRole] | None:
        names = [role_name(name) for name in roles or ()]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"the role {', '.join(repeated)} has two meanings: case and white space are ignored")
        return roles


RANDOM = "random"
"""A score that every row has: uniform in [0, 1), from the row's id and the stage's seed."""


class Score(StageConfig):
    """Computes scores of all rows and drops none."""

    kind: Literal["score"]
    output_type: ClassVar[OutputType] = "scored"
    data: str
    """Rows to score."""
    by: Annotated[tuple[Scorer, ...], Field(min_length=1)]
    """Scores to compute."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Maximum number of tokens for model scorers; longer rows are truncated at the end and counted."""

    def inputs(self) -> Iterator[StageRef]:
        yield StageRef(("data",), self.data, ROWS)
        for index, scorer in enumerate(self.by):
            for item in scorer.inputs():
                yield StageRef(("by", index, *item.path), item.stage, item.accepts)

    def model_refs(self) -> Iterator[ModelRef]:
        for index, scorer in enumerate(self.by):
            if scorer.model is not None:
                is_language_model = SCORERS[scorer.kind()].input_kind == "likelihood"
                yield ModelRef(("by", index), scorer.model, "language_model" if is_language_model else "classifier")

    @field_validator("by")
    @classmethod
    def _distinct(cls, by: tuple[Scorer, ...]) -> tuple[Scorer, ...]:
        names = [scorer.score for scorer in by]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two scores have the name {', '.join(repeated)}: set `name` of one of them")
        if taken := sorted({RANDOM, "id", "cached", "failed"} & set(names)):
            raise ValueError(f"a score can't have the name {', '.join(taken)}: it is reserved")
        return by


class Keep(Config):
    """One rule on one score; give exactly one of the first six keys. Rows without a score pass only `keep_fraction:
    1`."""

    keep_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep this share of all rows, best first; of equal scores those that come first in the data."""
    top_k: Annotated[int, Field(gt=0)] | None = None
    """Keep this number of rows, best first."""
    match_count_of: str | None = None
    """Keep as many rows as another stage has, best first. With `random`: the random baseline of that stage."""
    keep_fraction_of_rest: Annotated[float, Field(gt=0, le=1)] | None = None
    """Keep this share, best first, of the rows that have this score and pass all rules without `keep_fraction_of_rest`.
    (`keep_fraction` counts all rows.)"""
    threshold: float | None = None
    """Keep the rows whose score is this value or better."""
    range: Annotated[tuple[float | None, float | None], Field(min_length=2, max_length=2)] | None = None
    """Keep the rows whose score is in this range, ends included; null leaves an end open."""
    prefer: Literal["low", "high"] | None = None
    """Which direction of the score is better; the scorer's own when not given (low for perplexity, high for
    language)."""

    @model_validator(mode="after")
    def _one_rule(self) -> Keep:
        given = [name for name in KEEP_RULES if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"set one of {', '.join(f'`{name}`' for name in KEEP_RULES)}")
        if self.range is not None:
            low, high = self.range
            if low is None and high is None:
                raise ValueError("the range has no bound")
            if low is not None and high is not None and low > high:
                raise ValueError(f"the lower bound {low:g} is above the upper bound {high:g}")
            if self.prefer is not None:
                raise ValueError("a range has no direction: remove `prefer`")
        return self


KEEP_RULES = ("keep_fraction", "top_k", "match_count_of", "keep_fraction_of_rest", "threshold", "range")


class Quota(Config):
    """Limits the rows of each source or group."""

    group_by: Literal["source", "group"]
    """source: file or dataset; group: see `split` of a dataset."""
    rows: Annotated[int, Field(gt=0)]
    """Maximum number of rows of each."""
    sort_by: str | None = None
    """Score to sort by, best first; the order of the data when not given."""


class Diverse(Config):
    """Selects a diverse subset by the cosine similarity of embeddings."""

    embedding: str
    """Name of an `embedding` score without `reference`, which stores the rows' vectors."""
    method: Literal["k_center", "score_first"]
    """k_center: repeatedly the row farthest from the kept ones (Gonzalez 1985,
    https://doi.org/10.1016/0304-3975(85)90224-5; Sener & Savarese 2018, https://arxiv.org/abs/1708.00489); no subset of
    the same size more than halves the largest distance to a kept row. Prefers outliers: filter first. score_first: best
    score first, without rows too similar to a row kept before (Liu et al. 2024, DEITA,
    https://arxiv.org/abs/2312.15685)."""
    rows: Annotated[int, Field(gt=0)] | None = None
    """Maximum number of rows. Fewer if all others equal a kept row (k_center) or are too similar to one
    (score_first)."""
    keep_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """The same as a fraction of the rows that pass `keep` and `quota`."""
    score: str | None = None
    """Score to sort by in score_first; required there. `random` is always available."""
    prefer: Literal["low", "high"] | None = None
    """Which direction of `score` is better; the scorer's own when not given."""
    max_similarity: Annotated[float, Field(gt=-1, le=1)] | None = None
    """Cosine above which rows are too similar, in score_first; 0.9 (DEITA's) when not given. Which value is high
    depends on the model; the run reports the similarity of random rows."""

    @model_validator(mode="after")
    def _fields_of_its_method(self) -> Diverse:
        if self.rows is not None and self.keep_fraction is not None:
            raise ValueError("set one of `rows`, `keep_fraction`")
        if self.method == "k_center":
            if self.rows is None and self.keep_fraction is None:
                raise ValueError("k_center needs `rows` or `keep_fraction`")
            if given := [name for name in ("score", "prefer", "max_similarity") if getattr(self, name) is not None]:
                raise ValueError(f"k_center uses distances only: remove `{given[0]}`, or use score_first")
        elif self.score is None:
            raise ValueError("score_first needs a `score`; `random` is always available")
        return self


class Select(StageConfig):
    """Keeps rows by their scores and lists the dropped ones with the rule that dropped them."""

    kind: Literal["select"]
    output_type: ClassVar[OutputType] = "selected"
    data: str
    """Rows to select from; scored rows if a rule needs a score."""
    keep: dict[str, Keep] = Field(default_factory=dict)
    """Rules by name of the score. Each rule applies to all rows, whatever the others drop (except
    `keep_fraction_of_rest`). Optional with `quota` or `diverse`."""
    combine: Literal["all", "any"] = "all"
    """Whether a row must pass all rules, or any of them."""
    quota: Quota | None = None
    """Applied to the rows that pass `keep`."""
    diverse: Diverse | None = None
    """Applied last, to the rows that pass `keep` and `quota`."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of the score `random` and of the random baseline of `diverse`; the experiment's when not given."""

    @model_validator(mode="after")
    def _keeps_by_something(self) -> Select:
        if not self.keep and self.quota is None and self.diverse is None:
            raise ValueError("it keeps all rows: set `keep`, `quota` or `diverse`")
        if self.combine == "any" and any(rule.keep_fraction_of_rest is not None for rule in self.keep.values()):
            raise ValueError(
                "`keep_fraction_of_rest` counts rows that pass the other rules: with `combine: any` use `keep_fraction`"
            )
        return self

    @property
    def ranked_by(self) -> tuple[str, ...]:
        """Names of the scores that the stage uses, without duplicates."""
        others = (self.quota and self.quota.sort_by, self.diverse and self.diverse.score)
        return tuple(dict.fromkeys([*self.keep, *(score for score in others if score)]))

    def inputs(self) -> Iterator[StageRef]:
        yield StageRef(("data",), self.data, ROWS)
        for score, rule in self.keep.items():
            if rule.match_count_of is not None:
                yield StageRef(("keep", score, "match_count_of"), rule.match_count_of, ROWS)

    @property
    def uses_seed(self) -> bool:
        return RANDOM in self.ranked_by or self.diverse is not None

    def estimate_rows(self, rows: int) -> int:
        shares = [
            share for rule in self.keep.values() for share in (rule.keep_fraction, rule.keep_fraction_of_rest) if share
        ]
        kept = round(rows * min(shares, default=1.0))
        if self.diverse is None:
            return kept
        return min(self.diverse.rows or kept, round(kept * (self.diverse.keep_fraction or 1)))


class Review(StageConfig):
    """Applies a reviewer's decisions about rows near the cut of a `select` stage; they override the filter."""

    kind: Literal["review"]
    output_type: ClassVar[OutputType] = "rows"
    data: str
    """A `select` stage."""
    decisions: str
    """A .jsonl file, as `tunery review` writes it, or an .xlsx file, relative to the experiment file. It may be missing
    until there are decisions. Its content is part of the cache key."""
    rows: Annotated[int, Field(gt=0)] = 100
    """Number of rows to review, half of them on either side of the cut. 100 rows measure an agreement of 80% to within
    8 percentage points (two standard errors) and take about half an hour."""

    def inputs(self) -> Iterator[StageRef]:
        yield StageRef(("data",), self.data, ("selected",))

    @property
    def uses_seed(self) -> bool:
        return True

    @field_validator("decisions")
    @classmethod
    def _known_ending(cls, decisions: str) -> str:
        if not decisions.endswith((".jsonl", ".xlsx")):
            raise ValueError("it must end in .jsonl or .xlsx")
        return decisions


def _has_unique_names(models: tuple[str | Pretrained, ...]) -> tuple[str | Pretrained, ...]:
    names = [model_name(model) for model in models]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"{', '.join(repeated)} occurs twice")
    return models


FORGETTING = "forgetting"
"""The metric of an `evaluate` stage that needs its baseline."""


class Evaluate(StageConfig):
    """Loss (nats per token; of conversations over the responses only) and perplexity of each model on each set."""

    kind: Literal["evaluate"]
    output_type: ClassVar[OutputType] = "metrics"
    models: Annotated[tuple[Model, ...], Field(min_length=1), AfterValidator(_has_unique_names)]
    """Models to evaluate."""
    data: Annotated[dict[str, str], Field(min_length=1)]
    """Evaluation sets: name in the results, and the stage with the rows."""
    baseline: Model | None = None
    """One of `models`. The results then contain the forgetting of each model: the relative increase of its loss on the
    set over the baseline's."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Maximum number of tokens of a row."""

    def inputs(self) -> Iterator[StageRef]:
        for index, model in enumerate(self.models):
            yield from model_inputs(("models", index), model)
        for name, stage in self.data.items():
            yield StageRef(("data", name), stage, ROWS)
        if self.baseline is not None:
            yield from model_inputs(("baseline",), self.baseline)

    def model_refs(self) -> Iterator[ModelRef]:
        if self.baseline is not None:
            yield ModelRef(("baseline",), self.baseline, "language_model")
        for index, model in enumerate(self.models):
            yield ModelRef(("models", index), model, "language_model")

    def eval_refs(self) -> Iterator[StageRef]:
        return (item for item in self.inputs() if item.path[0] == "data")

    @property
    def result_names(self) -> list[str]:
        return [model_name(model) for model in self.models]

    @property
    def evaluated_models(self) -> tuple[str | Pretrained, ...]:
        return self.models

    def metric_paths(self, metrics: Iterable[str]) -> Iterator[str]:
        pairs = [(model, f"{model_name(model)}.{data}") for model in self.models for data in self.data]
        absolute = [metric for metric in metrics if metric != FORGETTING]
        yield from (f"{pair}.{metric}" for _, pair in pairs for metric in absolute)
        if self.baseline is not None:
            baseline = model_name(self.baseline)
            yield from (f"{pair}.{FORGETTING}" for model, pair in pairs if model_name(model) != baseline)

    def reduced_to(self, metrics: Sequence[Sequence[str]]) -> Self:
        baseline = self.baseline if any(metric == FORGETTING for *_, metric in metrics) else None
        names, sets = {model for model, *_ in metrics}, {data for _, data, _ in metrics}
        models = tuple(model for model in self.models if model_name(model) in names or model == baseline)
        data = {name: stage for name, stage in self.data.items() if name in sets}
        return self.model_copy(update={"models": models, "data": data, "baseline": baseline})

    @model_validator(mode="after")
    def _baseline_is_measured(self) -> Evaluate:
        if self.baseline is not None and self.baseline not in self.models:
            raise ValueError(f"the baseline `{model_name(self.baseline)}` is not among `models`: add it")
        return self


class WinRate(StageConfig):
    """Compares the responses of several models to the same prompts by a judge's rewards: how often each model beats the
    baseline.

    Use another reward model than the training did: a policy learns to exploit the errors of its reward model (Gao et
    al. 2022, https://arxiv.org/abs/2210.10760).
    """

    kind: Literal["win_rate"]
    output_type: ClassVar[OutputType] = "metrics"
    models: Annotated[tuple[Model, ...], Field(min_length=1), AfterValidator(_has_unique_names)]
    """Models to compare with the baseline."""
    baseline: Model
    """The baseline; not one of `models`."""
    judge: RewardSource
    """Reward that rates the responses."""
    data: str
    """Prompts: of conversations and preference pairs everything before the last response."""
    sampling: Sampling = Sampling()
    """How responses are sampled."""
    max_length: Annotated[int, Field(ge=8)] = 512
    """Maximum number of tokens of prompt and response; prompts that are too long for `sampling.max_new_tokens` are
    omitted and counted."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] | None = None
    """Seed of the sampling; the experiment's when not given."""

    def inputs(self) -> Iterator[StageRef]:
        for index, model in enumerate(self.models):
            yield from model_inputs(("models", index), model)
        yield from model_inputs(("baseline",), self.baseline)
        yield from reward_inputs(("judge",), self.judge)
        yield StageRef(("data",), self.data, ROWS)

    def model_refs(self) -> Iterator[ModelRef]:
        yield ModelRef(("judge",), self.judge, "reward")
        yield ModelRef(("baseline",), self.baseline, "language_model")
        for index, model in enumerate(self.models):
            yield ModelRef(("models", index), model, "language_model")

    def eval_refs(self) -> Iterator[StageRef]:
        return (item for item in self.inputs() if item.path[0] == "data")

    @property
    def uses_seed(self) -> bool:
        return True

    @property
    def result_names(self) -> list[str]:
        return [*(model_name(model) for model in self.evaluated_models), self.data]

    @property
    def evaluated_models(self) -> tuple[str | Pretrained, ...]:
        """The baseline and the models compared with it."""
        return self.baseline, *self.models

    def metric_paths(self, metrics: Iterable[str]) -> Iterator[str]:
        names = [model_name(model) for model in self.models]
        return (f"{name}.{self.data}.{metric}" for name, metric in itertools.product(names, metrics))

    def reduced_to(self, metrics: Sequence[Sequence[str]]) -> Self:
        names = {model for model, *_ in metrics}
        return self.model_copy(update={"models": tuple(model for model in self.models if model_name(model) in names)})

    @model_validator(mode="after")
    def _against_another(self) -> WinRate:
        if self.baseline in self.models:
            raise ValueError(f"`{model_name(self.baseline)}` would be compared with itself: remove it from `models`")
        _has_unique_names(self.evaluated_models)  # results are listed by name
        self.sampling.validate_lengths(self.max_length)
        return self
