"""Trainings on preferences and rewards: reward models, DPO, KTO, GRPO, RLOO and PPO; sampling and reward sources."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tunery.spec.references import (
    AUTO,
    ROWS,
    Auto,
    Config,
    Model,
    ModelRef,
    OutputType,
    PythonReward,
    RewardSource,
    StageRef,
    reward_inputs,
)
from tunery.spec.trainings import EmptyThinking, PairTruncation, RowsOrMixture, Training
from tunery.spec.tuners import FULL, Tuner

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Sampling(Config):
    """How responses are sampled from a model."""

    temperature: NotNegative = 1.0
    """Divisor of the logits; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: only the most likely tokens with this total probability (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751)."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """Minimum number of tokens before the end token."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Maximum number of tokens; a longer response is truncated."""

    def validate_lengths(self, max_length: int) -> None:
        """Raise ValueError if no response, or no prompt before it, fits into `max_length` tokens."""
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("`sampling.min_new_tokens` is more than `max_new_tokens`")
        if self.max_new_tokens >= max_length:
            raise ValueError(
                f"`max_length` ({max_length}) must be above `max_new_tokens` ({self.max_new_tokens}) to fit a prompt"
            )


class RewardTraining(Training[str]):
    """A reward model: a head of one output on a model, trained on preference pairs so that the chosen response gets a
    higher reward than the rejected one (Bradley-Terry; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section
    3.5).

    Its scale is arbitrary, so the mean and standard deviation over held-out responses (`eval_data`; without it the
    training pairs) are stored, and every user of the model gets (output - mean) / standard deviation.
    """

    output_type: ClassVar[OutputType] = "classifier"
    kind: Literal["reward"]
    model: Model
    """Initial model; a pretrained reward model keeps its head."""
    tuner: Tuner = FULL
    """Full fine-tuning or LoRA."""
    center: NotNegative = 0.0
    """Coefficient of a penalty (chosen + rejected)^2 that keeps rewards around 0 (Eisenstein et al. 2023,
    https://arxiv.org/abs/2312.09244, use 0.01)."""


REWARD = ("reward",)
"""Labels of a reward model that was trained here."""


class Dpo(Training[RowsOrMixture]):
    """Direct preference optimization on preference pairs (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290)."""

    kind: Literal["dpo"]
    model: Model
    """Initial model and reference."""
    tuner: Tuner = FULL
    """Full fine-tuning or LoRA."""
    truncate: PairTruncation = "left"
    """Truncation of a prompt and response with more than `max_length` tokens. left: removes the oldest messages and the
    beginning of the prompt, the same of both sides of a pair. right: the response loses its end. drop: the row is
    unusable."""
    empty_thinking: EmptyThinking = "mask"
    """As in `sft`."""
    beta: Positive = 0.1
    """Strength of the regularisation towards the reference."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid: DPO; hinge: SLiC (https://arxiv.org/abs/2305.10425); ipo: https://arxiv.org/abs/2310.12036."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of mislabelled pairs (cDPO, https://ericmitchell.ai/cdpo.pdf); only with the sigmoid loss."""
    reference_free: bool = False
    """Uses a uniform reference: no second model."""

    @property
    def num_frozen_models(self) -> int:
        return 0 if self.reference_free else 1

    @model_validator(mode="after")
    def _smoothing_of_sigmoid(self) -> Dpo:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"`label_smoothing` requires `loss: sigmoid`, but `loss` is {self.loss}")
        return self


class Kto(Training[RowsOrMixture]):
    """Kahneman-Tversky optimization on rated responses, or on both sides of preference pairs (Ethayarajh et al. 2024,
    https://arxiv.org/abs/2402.01306)."""

    kind: Literal["kto"]
    model: Model
    """Initial model and reference."""
    tuner: Tuner = FULL
    """Full fine-tuning or LoRA."""
    truncate: PairTruncation = "left"
    """As in `dpo`."""
    empty_thinking: EmptyThinking = "mask"
    """As in `sft`."""
    beta: Positive = 0.1
    """Strength of the regularisation towards the reference."""
    desirable_weight: Positive = 1.0
    """Weight of the loss of desirable responses."""
    undesirable_weight: Positive = 1.0
    """Weight of the loss of undesirable responses. If one kind is rarer, raise its weight: desirable rows x weight
    should be 1 to 4/3 times undesirable rows x weight (section 4.2)."""

    @property
    def num_frozen_models(self) -> int:
        return 1

    @model_validator(mode="after")
    def _others_in_a_step(self) -> Kto:
        if self.global_batch_size == 1:
            raise ValueError(
                "`global_batch_size` must be above 1: responses are compared with those to other prompts of the step"
            )
        return self


class OnlineRl(Training[str]):
    """Learns from sampled responses and their rewards. `data` gives the prompts: of conversations and preference pairs
    everything before the last response."""

    model: Model
    """Initial policy, and the reference."""
    tuner: Tuner = FULL
    """Full fine-tuning or LoRA."""
    reward: RewardSource
    """Reward of the responses."""
    sampling: Sampling = Sampling()
    """How responses are sampled; the temperature must be above 0."""

    @model_validator(mode="after")
    def _samples(self) -> OnlineRl:
        if not self.sampling.temperature:
            raise ValueError("`sampling.temperature` must be above 0: greedy responses give no learning signal")
        self.sampling.validate_lengths(self.max_length)
        return self

    def inputs(self) -> Iterator[StageRef]:
        yield from super().inputs()
        yield from reward_inputs(("reward",), self.reward)

    def model_refs(self) -> Iterator[ModelRef]:
        yield from super().model_refs()
        yield ModelRef(("reward",), self.reward, "reward")


class GroupRl(OnlineRl):
    """`global_batch_size` counts responses and is a multiple of `group_size`; `epochs` count passes over the
    prompts."""

    group_size: Annotated[int, Field(ge=2)] = 8
    """Responses per prompt."""
    iterations: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps on each batch of responses."""
    beta: NotNegative = 0.0
    """Coefficient of the KL divergence to the initial model; 0 needs no second model."""
    clip: Positive = 0.2
    """Clipping range of the probability ratio, which is 1 in the first iteration."""

    @property
    def sequences_per_row(self) -> int:
        return self.group_size

    @property
    def steps_per_batch(self) -> int:
        return self.iterations

    @property
    def num_frozen_models(self) -> int:
        return 1 if self.beta > 0 else 0

    @model_validator(mode="after")
    def _whole_groups(self) -> GroupRl:
        if self.global_batch_size != AUTO and self.global_batch_size % self.group_size:
            raise ValueError(
                f"`global_batch_size` ({self.global_batch_size}) counts responses: it must be a multiple of "
                f"`group_size` ({self.group_size})"
            )
        return self


class Grpo(GroupRl):
    """Group relative policy optimization: advantages are rewards relative to the group's (Shao et al. 2024,
    https://arxiv.org/abs/2402.03300). `global_batch_size` counts responses, `epochs` passes over the prompts."""

    kind: Literal["grpo"]
    loss: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """How token losses are averaged, with TRL's names. grpo: over each response; dr_grpo: over a constant
    (`max_new_tokens` per response); dapo: over all tokens of the step. (bnpo would depend on `compute`.)"""
    scale: Literal["group", "batch", "none"] = "group"
    """Standard deviation that advantages are divided by: of the group or of the batch."""


class Rloo(GroupRl):
    """REINFORCE leave-one-out: the baseline of a response is the mean reward of the others in its group (Ahmadian et
    al. 2024, https://arxiv.org/abs/2402.14740). `global_batch_size` counts responses, `epochs` passes over the
    prompts."""

    kind: Literal["rloo"]


class Kl(Config):
    """Penalty on the KL divergence from the initial model."""

    estimator: Literal["k1", "k3"] = "k1"
    """Estimator from sampled tokens (http://joschu.net/blog/kl-approx.html). k1, log p - log q, can be negative; k3 is
    not and has lower variance while the two are close."""
    coefficient: NotNegative = 0.05
    """Coefficient of the penalty in each token's reward."""
    target: Positive | None = None
    """Target in nats per response. If given, the coefficient is adapted to keep KL near it (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, section 2.2)."""
    horizon: Positive = 10_000.0
    """Number of responses over which the coefficient adapts."""
    max_kl: Positive = 100.0
    """Maximum KL in nats per response; above it the training fails."""

    @model_validator(mode="after")
    def _can_be_adapted(self) -> Kl:
        if self.target is not None and not self.coefficient:
            raise ValueError("a `coefficient` of 0 can't be adapted to a `target`: use a positive one")
        return self


class Ptx(Config):
    """Adds the loss of pretraining or SFT to PPO's to reduce forgetting (PPO-ptx, Ouyang et al. 2022, eq. 2)."""

    data: str
    """Texts, or conversations, of which the responses count."""
    coefficient: Positive = 1.0
    """Coefficient of the added loss."""


class Ppo(OnlineRl):
    """Proximal policy optimization with a value model (Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for
    language models Ziegler et al. 2019, https://arxiv.org/abs/1909.08593). Dropout is off, LoRA's too.

    A step generates a response to each of `global_batch_size` prompts, scores them, and then passes `ppo_epochs` times
    over them in `minibatches`, with one optimizer step each. `epochs` count passes over the prompts.
    """

    warmup_offset: ClassVar[int] = 1
    kind: Literal["ppo"]
    value_init: Literal["reward", "policy"] | Auto = AUTO
    """Initial value model. auto: the reward model if it has the policy's vocabulary (as in InstructGPT), else the
    policy with a new head."""
    allow_retokenize: bool = False
    """Allows a reward model with another tokenizer, which then gets the responses as text."""
    minibatches: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps per pass over a batch of responses."""
    ppo_epochs: Annotated[int, Field(ge=1)] = 4
    """Passes over each batch of responses."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount factor per token."""
    gae_lambda: Share = 0.95
    """Lambda of generalized advantage estimation (Schulman et al. 2015, https://arxiv.org/abs/1506.02438)."""
    clip: Positive = 0.2
    """Clipping range of the probability ratio."""
    value_clip: Positive | None = 0.2
    """Clipping range of values around the old ones; null: no clipping."""
    value_coefficient: NotNegative = 0.1
    """Coefficient of the value loss."""
    entropy_coefficient: NotNegative = 0.0
    """Coefficient of the entropy bonus."""
    whiten_rewards: bool = False
    """Whether to scale token rewards to standard deviation 1, keeping their mean."""
    whiten_advantages: bool = True
    """Whether to normalise advantages to mean 0 and standard deviation 1 over all response tokens of the batch, on all
    workers."""
    missing_eos_penalty: NotNegative = 0.0
    """Subtracted from the reward of a truncated response."""
    kl: Kl = Kl()
    """KL penalty."""
    ptx: Ptx | None = None
    """Loss added against forgetting."""

    def inputs(self) -> Iterator[StageRef]:
        yield from super().inputs()
        if self.ptx is not None:
            yield StageRef(("ptx", "data"), self.ptx.data, ROWS)

    @property
    def num_minibatches(self) -> int:
        return self.minibatches

    @property
    def num_frozen_models(self) -> int:
        return 1 if isinstance(self.reward, PythonReward) else 2  # the reference and the reward model

    @model_validator(mode="after")
    def _minibatches_are_equal(self) -> Ppo:
        if self.global_batch_size != AUTO and self.global_batch_size % self.minibatches:
            raise ValueError(
                f"`minibatches` ({self.minibatches}) does not divide `global_batch_size` ({self.global_batch_size})"
            )
        return self
