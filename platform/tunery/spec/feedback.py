"""The stages that learn from preferences and rewards: reward models, PPO, and the methods beside it; and how answers
are drawn and rated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from tunery.spec.references import AUTO, ROWS, Auto, Config, Gives, Model, Pretrained, StageRef
from tunery.spec.trainings import EmptyThinking, PairTruncation, RowsOrMixture, Training, Tuner

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]


class Sampling(Config):
    """How an answer is drawn from a model, token by token."""

    temperature: NotNegative = 1.0
    """Logits are divided by it; 0 takes the likeliest token."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the likeliest tokens that together have this probability (Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751)."""
    min_new_tokens: Annotated[int, Field(ge=0)] = 0
    """The end token is not drawn before so many others."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """An answer that has not ended by then is cut off."""

    def check_room(self, max_length: int) -> None:
        """Raises ValueError where no answer fits, or none behind a prompt within `max_length` tokens."""
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("`sampling.min_new_tokens` is more than `max_new_tokens`")
        if self.max_new_tokens >= max_length:
            raise ValueError(
                f"`max_length` ({max_length}) leaves no room for a prompt before {self.max_new_tokens} new tokens"
            )


class PythonReward(Config):
    """A function of one's own: `reward(prompts, answers)` gets two lists of texts and returns a list of numbers."""

    python: str
    """A .py file, relative to the experiment's file; its content belongs to the fingerprint."""
    function: str = "reward"


def _reward_tag(value: object) -> str:
    if isinstance(value, PythonReward) or (isinstance(value, dict) and {"python", "function"} & value.keys()):
        return "python"
    return "stage" if isinstance(value, str) else "pretrained"


RewardSource = Annotated[
    Annotated[str, Tag("stage")] | Annotated[Pretrained, Tag("pretrained")] | Annotated[PythonReward, Tag("python")],
    Discriminator(_reward_tag),
]
"""A `reward` stage, `{pretrained: ..}` with a sequence-classification model of one output, or `{python: file.py}`."""


def reward_inputs(path: tuple[str | int, ...], reward: str | Pretrained | PythonReward) -> Iterator[StageRef]:
    if isinstance(reward, str):
        yield StageRef(path, reward, ("classifier",))


class RewardTraining(Training[str]):
    """A reward model: a head of one output on a model, trained on preference pairs so that the chosen answer gets more
    than the rejected one (Bradley-Terry; Ouyang et al. 2022, https://arxiv.org/abs/2203.02155, section 3.5).

    Its scale is arbitrary, so mean and standard deviation over held-out answers (`eval_data`; without it the training
    pairs) are measured and kept: whoever asks it, the scorer `reward` or `ppo`, gets (output - mean) / deviation.
    """

    gives: ClassVar[Gives] = "classifier"
    metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_accuracy", "eval_margin")
    kind: Literal["reward"]
    model: Model
    tuner: Tuner = "full"
    center: NotNegative = 0.0
    """Coefficient of (chosen + rejected)^2, which keeps rewards around 0 (Eisenstein et al. 2023,
    https://arxiv.org/abs/2312.09244, who take 0.01)."""


class Dpo(Training[RowsOrMixture]):
    """Direct preference optimization on preference pairs (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290)."""

    metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_accuracy", "eval_margin")
    kind: Literal["dpo"]
    model: Model
    """What training begins with, and the reference that it is held to."""
    tuner: Tuner = "full"
    truncate: PairTruncation = "left"
    empty_thinking: EmptyThinking = "mask"
    beta: Positive = 0.1
    """How strongly it is held to the reference."""
    loss: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """sigmoid: DPO's own; hinge: SLiC (https://arxiv.org/abs/2305.10425); ipo: https://arxiv.org/abs/2310.12036."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the pairs that are taken to be the wrong way round (cDPO, https://ericmitchell.ai/cdpo.pdf); of the
    sigmoid loss."""
    reference_free: bool = False
    """The reference is taken to find every answer equally likely: no second model."""

    @model_validator(mode="after")
    def _smoothing_of_sigmoid(self) -> Dpo:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"`label_smoothing` belongs to `loss: sigmoid`, not to {self.loss}")
        return self


class Kto(Training[RowsOrMixture]):
    """Kahneman-Tversky optimization on rated answers, or on both sides of preference pairs (Ethayarajh et al. 2024,
    https://arxiv.org/abs/2402.01306)."""

    metrics: ClassVar[tuple[str, ...]] = ("eval_loss", "eval_margin")
    kind: Literal["kto"]
    model: Model
    tuner: Tuner = "full"
    truncate: PairTruncation = "left"
    empty_thinking: EmptyThinking = "mask"
    beta: Positive = 0.1
    desirable_weight: Positive = 1.0
    undesirable_weight: Positive = 1.0
    """Where one kind is rarer, give it more: desirable rows x weight within 1 to 4/3 of the other (section 4.2)."""

    @model_validator(mode="after")
    def _others_in_a_step(self) -> Kto:
        if self.global_batch_size == 1:
            raise ValueError("`global_batch_size` 1: answers are compared with those to other prompts of the same step")
        return self


class OnlineRl(Training[str]):
    """Learns from answers that the model draws itself, and a reward for each. `data` gives the prompts: of
    conversations and preference pairs all that comes before the answer."""

    model: Model
    tuner: Tuner = "full"
    reward: RewardSource
    sampling: Sampling = Sampling()

    @model_validator(mode="after")
    def _draws(self) -> OnlineRl:
        if not self.sampling.temperature:
            raise ValueError("at `sampling.temperature` 0 nothing is drawn: there is nothing to learn from")
        self.sampling.check_room(self.max_length)
        return self

    def inputs(self) -> Iterator[StageRef]:
        yield from super().inputs()
        yield from reward_inputs(("reward",), self.reward)


class GroupRl(OnlineRl):
    """`global_batch_size` counts answers: a multiple of `group_size`. `epochs` are over the prompts."""

    metrics: ClassVar[tuple[str, ...]] = ("eval_reward",)
    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers a prompt."""
    iterations: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps over each batch of answers."""
    beta: NotNegative = 0.0
    """Of the KL divergence to the model that training began with; 0 needs no second model."""
    clip: Positive = 0.2
    """Of the ratio of new to old probabilities, which is 1 in the first of the iterations."""

    @model_validator(mode="after")
    def _whole_groups(self) -> GroupRl:
        if self.global_batch_size != AUTO and self.global_batch_size % self.group_size:
            raise ValueError(
                f"`global_batch_size` ({self.global_batch_size}) counts answers: it must be a multiple of "
                f"`group_size` ({self.group_size})"
            )
        return self


class Grpo(GroupRl):
    """Group relative policy optimization: a reward counts by how far it is above its group's (Shao et al. 2024,
    https://arxiv.org/abs/2402.03300)."""

    kind: Literal["grpo"]
    loss: Literal["grpo", "dr_grpo", "dapo"] = "dapo"
    """How token losses are averaged, as TRL names it: over each answer, over a constant (`max_new_tokens` an answer),
    or over all tokens of the step. (bnpo, over all tokens of a micro batch, would depend on `compute`.)"""
    scale: Literal["group", "batch", "none"] = "group"
    """What advantages are divided by the deviation of."""


class Rloo(GroupRl):
    """REINFORCE leave-one-out: a reward counts by how far it is above the mean of the others in its group (Ahmadian et
    al. 2024, https://arxiv.org/abs/2402.14740)."""

    kind: Literal["rloo"]


class Kl(Config):
    """What holds the policy near the model that it began with."""

    estimator: Literal["k1", "k3"] = "k1"
    """Of the KL divergence from sampled tokens (http://joschu.net/blog/kl-approx.html). k1, log p - log q, can be
    negative; k3 never is, and varies less while the two are near."""
    coefficient: NotNegative = 0.05
    """Of the penalty in each token's reward."""
    target: Positive | None = None
    """Nats an answer. Given, the coefficient is adapted so that KL stays near it (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, section 2.2)."""
    horizon: Positive = 10_000.0
    """Answers over which it is adapted."""
    max_kl: Positive = 100.0
    """Nats an answer: beyond, the policy has left all that the reward model knows, and the training ends with an
    error."""

    @model_validator(mode="after")
    def _can_be_adapted(self) -> Kl:
        if self.target is not None and not self.coefficient:
            raise ValueError("a `coefficient` of 0 can't be adapted to a `target`: begin with another")
        return self


class Ptx(Config):
    """Mixes the loss of pre-training or SFT into PPO's, against forgetting (PPO-ptx, Ouyang et al. 2022, eq. 2)."""

    data: str
    """Texts, or conversations whose answers count."""
    coefficient: Positive = 1.0


class Ppo(OnlineRl):
    """Proximal policy optimization with a value model (Schulman et al. 2017, https://arxiv.org/abs/1707.06347; for
    language models Ziegler et al. 2019, https://arxiv.org/abs/1909.08593). Without dropout, LoRA's too.

    A step draws an answer to each of `global_batch_size` prompts, rates them, and then goes `ppo_epochs` times over
    them in `minibatches`, an optimizer step each. `epochs` are over the prompts.
    """

    metrics: ClassVar[tuple[str, ...]] = ("eval_reward", "eval_kl")
    kind: Literal["ppo"]
    value_init: Literal["reward", "policy"] | Auto = AUTO
    """What the value model begins with; auto: the reward model, where it is one that reads the policy's tokens (as in
    InstructGPT)."""
    allow_retokenize: bool = False
    """Allow a reward model with another tokenizer: answers are decoded, and read by it as text."""
    minibatches: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps each time over a batch of answers."""
    ppo_epochs: Annotated[int, Field(ge=1)] = 4
    """Times over each batch of answers."""
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount a token."""
    gae_lambda: Share = 0.95
    """Of generalized advantage estimation (Schulman et al. 2015, https://arxiv.org/abs/1506.02438)."""
    clip: Positive = 0.2
    """Of the ratio of new to old probabilities."""
    value_clip: Positive | None = 0.2
    """How far a value may move from its old one before its loss stops counting; null: any distance."""
    value_coefficient: NotNegative = 0.1
    entropy_coefficient: NotNegative = 0.0
    whiten_rewards: bool = False
    whiten_advantages: bool = True
    """To mean 0 and deviation 1 over all answer tokens of the batch, on all workers."""
    missing_eos_penalty: NotNegative = 0.0
    """Taken off the reward of an answer that was cut off."""
    kl: Kl = Kl()
    ptx: Ptx | None = None

    def inputs(self) -> Iterator[StageRef]:
        yield from super().inputs()
        if self.ptx is not None:
            yield StageRef(("ptx", "data"), self.ptx.data, ROWS)

    @model_validator(mode="after")
    def _minibatches_are_equal(self) -> Ppo:
        if self.global_batch_size != AUTO and self.global_batch_size % self.minibatches:
            raise ValueError(
                f"`minibatches` ({self.minibatches}) does not divide `global_batch_size` ({self.global_batch_size})"
            )
        return self
