"""Registry of stage kinds and trainers: one entry per kind says what the rest of the code needs to know about it.

What depends on the values of a stage is a method or property of its config (spec/stage_config.py). Functions and
classes are referred to as "module:name", so that planning imports neither torch nor Ray.

Increase the version of a kind when a code change alters the result for the same inputs: the artifacts of the stage, and
those that depend on them, are rebuilt. When rows are encoded to different tokens, increase `ENCODING_VERSION`
(models/encode.py) instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, get_args

from tunery.spec.augment import Augment
from tunery.spec.feedback import REWARD, Dpo, Grpo, Kto, Ppo, RewardTraining, Rloo
from tunery.spec.plugins import KindUnion, Registry
from tunery.spec.stage_config import StageConfig
from tunery.spec.stages import FORGETTING, Dataset, Evaluate, Review, Score, Select, WinRate
from tunery.spec.trainings import LABELS, ClassifierTraining, Pretrain, Sft, Training

Direction = Literal["minimize", "maximize"]
KlUnit = Literal["response", "token"]
KL_UNITS: tuple[KlUnit, ...] = get_args(KlUnit)


@dataclass(frozen=True)
class DataRequirement:
    """Row formats that a stage kind accepts, and the texts of the error for other formats."""

    formats: tuple[str, ...]
    what: str
    cause: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """A kind of stage."""

    config: type[StageConfig]
    run: str
    """Function from StageContext to StageResult (store/context.py)."""
    version: int
    needs_ray: bool = False
    summary: str
    """Function from the facts of an artifact to one line for the terminal."""
    requirement: DataRequirement | None = None
    """None: it accepts every row format."""
    row_encoding: str = ""
    """RowEncoding (models/encode_rows.py) of the rows in `data`; "" if they are not encoded, or differently for
    each model."""
    metrics: Mapping[str, Direction] = field(default_factory=dict)
    """Metrics that a search can optimize, and which of their values are better. The first one of a trainer is its
    result in JSON output."""
    other_metrics: Mapping[str, Direction] = field(default_factory=dict)
    """Further metrics in the facts of an artifact that the report compares, and which of their values are better."""

    @property
    def kind(self) -> str:
        """The name of the kind in an experiment."""
        name: str = get_args(self.config.model_fields["kind"].annotation)[0]
        return name

    def direction(self, metric: str) -> Direction | None:
        """Return which values of the metric are better; None for what is no metric, such as a number of rows."""
        return self.metrics.get(metric) or self.other_metrics.get(metric)

    def cost(self, metric: str, value: float) -> float:
        """Return the value of a metric with the sign that makes lower better. Raises KeyError for an unknown metric."""
        return value if {**self.other_metrics, **self.metrics}[metric] == "minimize" else -value


@dataclass(frozen=True)
class EpochRule:
    """The value of `epochs: auto` for trainings with fewer than `max_rows` rows."""

    max_rows: float
    epochs: float
    reason: str


EPOCHS = (
    EpochRule(10_000, 3.0, "fewer than 10,000 rows"),
    EpochRule(100_000, 2.0, "fewer than 100,000 rows"),
    EpochRule(float("inf"), 1.0, "100,000 rows or more"),
)
# Up to 4 repetitions of the data are worth nearly as much as new data:
# Muennighoff et al. 2023 (https://arxiv.org/abs/2305.16264).
PRETRAINING_EPOCHS = (
    EpochRule(100_000, 4.0, "few rows (< 100,000): repeat up to 4 times"),
    EpochRule(float("inf"), 1.0, "100,000 rows or more"),
)


@dataclass(frozen=True, kw_only=True)
class TrainerSpec(StageKind):
    """A kind of training. `metrics` are those on `eval_data`."""

    config: type[Training[Any]]
    run: str = "tunery.training.launch:run_training"
    needs_ray: bool = True
    summary: str = "tunery.events.stage_summary:training_summary"
    metrics: Mapping[str, Direction] = field(default_factory=lambda: {"eval_loss": "minimize"})
    loop: str = "tunery.training.worker:train"
    """Training loop of each worker, a function of Job and Report (training/job.py)."""
    trainer: str = ""
    """TrainingTask class (training/job.py) that the default loop uses."""
    packable: bool = False
    """Whether LoRA trainings of this kind can train in packs (training/packed)."""
    extra_metrics: tuple[str, ...] = ()
    """Metrics that the default loop logs besides loss, learning rate and gradient norm, under the trainer's names."""
    primary_metric: str = "loss"
    """Metric of the main chart in the report, if it is logged; else the loss."""
    learning_rate: float = 2e-5
    """`learning_rate: auto` of a pretrained model in full fine-tuning."""
    learning_rate_reason: str = "full fine-tuning of a pretrained model"
    epochs: tuple[EpochRule, ...] = EPOCHS
    """`epochs: auto`: the first rule that applies."""
    sequences_per_format: Mapping[str, int] = field(default_factory=dict)
    """Number of sequences of a row, by row format; 1 if not listed."""
    num_trained_models: int = 1
    """Number of models, or adapters of one base model, that are trained."""
    kl_unit: KlUnit = "token"
    """What the metric `kl` is a mean over: TRL's trainers average over tokens, PPO sums over each response."""
    counts_max_length: bool = False
    """Whether evaluations report `max_length` tokens for each row, instead of the tokens of the row."""
    labels: tuple[str, ...] = ()
    """Labels of the classification head; () for a language model."""
    fits_temperature: bool = False
    """Whether a temperature of the probabilities is fitted on `eval_data`."""
    model_name: str = "causal language model"
    """What the model is called in the card of an exported model."""
    card_remarks: str = ""
    """Function from the facts to further sentences of that card."""
    table: str = ""
    """Function from the trainings of all kinds with this table, and their artifacts, to a table that is printed at the
    end of a run (reporting/training_tables.py)."""

    @property
    def model_form(self) -> Literal["causal", "classifier"]:
        return "classifier" if self.config.output_type == "classifier" else "causal"


_PAIRS = DataRequirement(
    ("preference",),
    "preference pairs",
    "it learns from an answer that is preferred to another",
    "give rows with `chosen` and `rejected` (docs/data.md)",
)
_PROMPTS = DataRequirement(
    ("prompt", "conversation", "preference", "rated"),
    "prompts",
    "a text holds no question to be answered",
    "use rows with questions; their answers are not looked at",
)


def _policy_spec(config: type[Training[Any]], **fields: Any) -> TrainerSpec:
    """Return the entry of a trainer that changes a policy by preferences or rewards."""
    # TRL's default for DPO, GRPO and RLOO (1.16).
    return TrainerSpec(
        config=config, learning_rate=1e-6, learning_rate_reason="preferences and rewards, full", **fields
    )


def _online_rl_spec(config: type[Training[Any]], **fields: Any) -> TrainerSpec:
    """Return the entry of a trainer that learns from sampled responses and their rewards."""
    return _policy_spec(
        config,
        requirement=_PROMPTS,
        row_encoding="tunery.models.row_encodings:PROMPTS",
        primary_metric="reward",
        summary="tunery.events.stage_summary:policy_summary",
        table="tunery.reporting.training_tables:policy_table",
        **fields,
    )


_GROUP_RL_METRICS = ("reward", "kl", "entropy", "clip_fraction", "reward_std", "response_length", "clipped_ratio")

STAGE_KINDS: Registry[StageKind] = Registry(
    "stages",
    StageKind,
    (
        StageKind(
            config=Dataset,
            run="tunery.ingest.dataset:run_dataset",
            version=4,
            summary="tunery.events.stage_summary:dataset_summary",
        ),
        StageKind(
            config=Score,
            run="tunery.scoring.score:run_scoring",
            version=4,
            needs_ray=True,
            summary="tunery.events.stage_summary:score_summary",
            other_metrics={"auc": "maximize"},
        ),
        StageKind(
            config=Select,
            run="tunery.selection.select_stage:run_select",
            version=3,
            summary="tunery.events.stage_summary:select_summary",
        ),
        StageKind(
            config=Review,
            run="tunery.review.review_stage:run_review",
            version=3,
            summary="tunery.events.stage_summary:review_summary",
        ),
        StageKind(
            config=Augment,
            run="tunery.augment.augment_stage:run_augment",
            version=2,
            summary="tunery.events.stage_summary:augment_summary",
        ),
        TrainerSpec(
            config=Pretrain,
            version=2,
            trainer="tunery.training.sft:SftTask",
            row_encoding="tunery.models.row_encodings:DOCUMENTS",
            epochs=PRETRAINING_EPOCHS,
        ),
        TrainerSpec(
            config=Sft,
            version=2,
            trainer="tunery.training.sft:SftTask",
            row_encoding="tunery.models.row_encodings:CONVERSATIONS",
            requirement=DataRequirement(
                ("conversation", "preference", "rated"),
                "conversations with answers",
                "sft counts the loss of answers only",
                "use rows with question and answer, or train on texts with `kind: pretrain`",
            ),
            packable=True,
        ),
        TrainerSpec(
            config=ClassifierTraining,
            version=3,
            trainer="tunery.training.classifier:ClassifierTask",
            row_encoding="tunery.models.row_encodings:LABELLED_ROWS",
            metrics={"eval_loss": "minimize", "eval_accuracy": "maximize", "eval_auc": "maximize"},
            summary="tunery.events.stage_summary:classifier_summary",
            labels=LABELS,
            fits_temperature=True,
            model_name="text classifier",
            card_remarks="tunery.export.card:classifier_remarks",
            table="tunery.reporting.training_tables:classifier_table",
        ),
        TrainerSpec(
            config=RewardTraining,
            version=3,
            trainer="tunery.training.reward:RewardTask",
            row_encoding="tunery.models.row_encodings:REWARD_PAIRS",
            requirement=_PAIRS,
            metrics={"eval_loss": "minimize", "eval_accuracy": "maximize", "eval_margin": "maximize"},
            summary="tunery.events.stage_summary:preference_summary",
            labels=REWARD,
            model_name="reward model",
            card_remarks="tunery.export.card:reward_remarks",
            table="tunery.reporting.training_tables:reward_table",
        ),
        _policy_spec(
            Dpo,
            version=2,
            trainer="tunery.training.dpo:DpoTask",
            row_encoding="tunery.models.row_encodings:PREFERENCE_PAIRS",
            requirement=_PAIRS,
            metrics={"eval_loss": "minimize", "eval_accuracy": "maximize", "eval_margin": "maximize"},
            extra_metrics=("margin", "accuracy"),
            summary="tunery.events.stage_summary:preference_summary",
        ),
        _policy_spec(
            Kto,
            version=2,
            trainer="tunery.training.kto:KtoTask",
            row_encoding="tunery.models.row_encodings:RATED_RESPONSES",
            requirement=DataRequirement(
                ("rated", "preference"),
                "rated answers",
                "it learns from answers that are known to be wanted or unwanted",
                "give rows with a `label`, or preference pairs (docs/data.md)",
            ),
            metrics={"eval_loss": "minimize", "eval_margin": "maximize"},
            extra_metrics=("margin", "kl"),
            sequences_per_format={"preference": 2},
            summary="tunery.events.stage_summary:margin_summary",
        ),
        _online_rl_spec(
            Grpo,
            version=3,
            trainer="tunery.training.grpo:GrpoTask",
            metrics={"eval_reward": "maximize"},
            extra_metrics=_GROUP_RL_METRICS,
        ),
        _online_rl_spec(
            Rloo,
            version=3,
            trainer="tunery.training.grpo:RlooTask",
            metrics={"eval_reward": "maximize"},
            extra_metrics=_GROUP_RL_METRICS,
        ),
        _online_rl_spec(
            Ppo,
            version=4,
            loop="tunery.training.ppo.ppo_worker:train",
            metrics={"eval_reward": "maximize", "eval_kl": "minimize"},
            kl_unit="response",
            num_trained_models=2,  # policy and value model
            counts_max_length=True,
        ),
        StageKind(
            config=Evaluate,
            run="tunery.evaluation.loss_eval:run_evaluate",
            version=2,
            needs_ray=True,
            summary="tunery.events.stage_summary:evaluate_summary",
            metrics={"loss": "minimize", "perplexity": "minimize", FORGETTING: "minimize"},
        ),
        StageKind(
            config=WinRate,
            run="tunery.evaluation.win_rate:run_win_rate",
            version=3,
            needs_ray=True,
            summary="tunery.events.stage_summary:win_rate_summary",
            requirement=_PROMPTS,
            row_encoding="tunery.models.row_encodings:PROMPTS",
            metrics={"win_rate": "maximize", "reward": "maximize"},
        ),
    ),
)
"""All kinds, those of plugins last."""


class _Trainers(Mapping[str, TrainerSpec]):
    """The trainers among the stage kinds."""

    def __getitem__(self, kind: str) -> TrainerSpec:
        spec = STAGE_KINDS[kind]
        if not isinstance(spec, TrainerSpec):
            raise KeyError(kind)
        return spec

    def __iter__(self) -> Iterator[str]:
        return (kind for kind, spec in STAGE_KINDS.items() if isinstance(spec, TrainerSpec))

    def __len__(self) -> int:
        return sum(1 for _ in self)


TRAINERS: Mapping[str, TrainerSpec] = _Trainers()

STAGE_UNION = KindUnion(lambda: {kind: spec.config for kind, spec in STAGE_KINDS.items()}, "kind")
Stage = Annotated[StageConfig, STAGE_UNION]
"""A stage of any kind, selected by its key `kind`."""
