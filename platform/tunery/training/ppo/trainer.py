"""A step of PPO: draw answers, rate them, work out advantages, update policy and value model.

Every worker draws and rates its share of a step's prompts, then all hold the whole batch (rollouts.py), and each goes
over its share of every minibatch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist

from tunery.models.encode import template_suffix_ids
from tunery.models.generate import Response, TransformersEngine, decode_response
from tunery.models.sampling import uniform_numbers
from tunery.spec import Ppo
from tunery.training.batches import Batching
from tunery.training.collectives import mean_over_ranks
from tunery.training.divergence import DivergenceGuard, check_finite, step_result
from tunery.training.ppo.advantages import explained_variance, generalized_advantages, masked_mean, whiten
from tunery.training.ppo.build import Models
from tunery.training.ppo.engine import set_hyperparams, whole_weights
from tunery.training.ppo.kl import adapt_kl_coef, apply_eos_penalty, kl_per_token, token_rewards
from tunery.training.ppo.losses import policy_loss, value_loss
from tunery.training.ppo.models import POLICY
from tunery.training.ppo.ptx import MixedRows
from tunery.training.ppo.rollouts import (
    MicroBatch,
    Rollouts,
    RolloutScores,
    all_gather_list,
    gather_rollouts,
    joined,
    micro_batch,
    minibatches,
    shard_by_length,
)
from tunery.training.ppo.sanity_checks import check_kl, check_rewards_differ
from tunery.training.schedule import values_by_step
from tunery.training.sequences import PromptSet
from tunery.training.training_stats import SKIPPED_STEPS

Phase = Literal["rollout", "score", "update"]
SCORED_TOGETHER = 4
"""Micro batches that share a forward pass where nothing is kept for a backward pass; not where a model makes logits of
all its tokens."""


@dataclass
class PpoState:
    """What a step changes beside the weights; all of it is in a checkpoint."""

    step: int = 0
    kl_coefficient: float = 0.0
    least: float = math.inf
    most: float = -math.inf
    """Rewards of all answers so far."""


@dataclass
class Timing:
    """Seconds of this worker and tokens of all, by phase."""

    seconds: dict[Phase, float] = field(default_factory=dict)
    tokens: dict[Phase, int] = field(default_factory=dict)


@dataclass(frozen=True)
class AdvantageTargets:
    """What the update aims at, (answers, longest answer) each."""

    advantages_bt: torch.Tensor
    returns_bt: torch.Tensor


class PpoTrainer:
    def __init__(
        self,
        stage: str,
        spec: Ppo,
        seed: int,
        models: Models,
        engine: Any,
        reference: Any,
        reward: Any,
        batching: Batching,
        minibatch: Batching,
        prompts: PromptSet,
        mixed: MixedRows | None,
        tokenizer: Any,
        end: Sequence[int],
        zero_stage: int,
    ) -> None:
        """engine: of models.trained; reference, reward: those of `models`, as they are asked (sharded or not)."""
        self._stage, self._spec, self._seed = stage, spec, seed
        self._models, self._engine, self._reference, self._reward = models, engine, reference, reward
        self._batching, self._minibatch, self._zero_stage = batching, minibatch, zero_stage
        self._prompts, self._mixed, self._tokenizer = prompts, mixed, tokenizer
        self._rank, self._workers = dist.get_rank(), dist.get_world_size()
        self._device = torch.device(engine.device)
        self._sampler = TransformersEngine(engine.module.policy.model, end)
        self._end = set(end)
        self._closing = template_suffix_ids(tokenizer, self._end)
        self.state = PpoState(kl_coefficient=spec.kl.coefficient)
        self.guard = DivergenceGuard(stage)
        self.timing = Timing()

    def step(self, rows: Sequence[int]) -> dict[str, float]:
        """One batch of answers to the prompts `rows`, and the optimizer steps that it serves. What is told of it."""
        spec, state = self._spec, self.state
        self.timing = Timing()
        step, skipped_before = state.step + 1, self.guard.skipped_steps
        rollouts = self.draw(self._prompts, rows, f"step {state.step}")
        rated = self.rate(self._prompts, rollouts)
        kl_b = self.kl(rollouts, rated)
        kl, reward = float(kl_b.mean()), float(rated.scores_b.mean())
        check_finite(self._stage, step, reward=reward, kl=kl, mean_value=float(rated.values_bt.mean()))
        check_kl(self._stage, step, kl, spec.kl.max_kl)
        rewards_b = apply_eos_penalty(rated.scores_b, torch.tensor(rollouts.ended), spec.missing_eos_penalty)
        state.least, state.most = min(state.least, float(rewards_b.min())), max(state.most, float(rewards_b.max()))
        check_rewards_differ(
            self._stage, state.least, state.most, step * len(rollouts.rows), step == self._batching.steps
        )
        targets = self.aim(rollouts, rated)
        rate = learning_rate_at(state.step, self._batching.steps, spec)
        set_hyperparams(self._engine, rate, values_by_step("weight_decay", spec, self._batching.steps)[state.step])
        updated = self.update(rollouts, rated, targets, rate)
        check_finite(self._stage, step, learning_rate=rate, **updated)
        mask_bt = rollouts.mask_bt
        told = {
            "reward": reward,
            "reward_deviation": float(rated.scores_b.std(correction=0)),
            "kl": kl,
            "kl_coefficient": state.kl_coefficient,
            "entropy": float(masked_mean(rated.entropy_bt, mask_bt)),
            **updated,
            "explained_variance": explained_variance(rated.values_bt, targets.returns_bt, mask_bt),
            "returns": float(masked_mean(targets.returns_bt, mask_bt)),
            "response_length": float(mask_bt.sum(dim=1).float().mean()),
            "eos_rate": sum(rollouts.ended) / len(rollouts.ended),
            "sampler_gap": float(masked_mean((rated.log_probs_bt - _padded(rollouts)).abs(), mask_bt)),
            "learning_rate": rate,
        }
        if self.guard.skipped_steps > skipped_before:
            told[SKIPPED_STEPS] = float(self.guard.skipped_steps)
        if spec.kl.target is not None:
            state.kl_coefficient = adapt_kl_coef(
                state.kl_coefficient, kl, spec.kl.target, spec.kl.horizon, len(rollouts.rows)
            )
        state.step = step
        return told

    def draw(self, prompts: PromptSet, rows: Sequence[int], name: str) -> Rollouts:
        """An answer to each of the prompts `rows`; which, depends on (seed, name, row and how often it stood before)
        alone."""
        asked = [prompts.ids(int(row)) for row in rows]
        mine = self._share(range(len(rows)), [len(prompt) for prompt in asked])
        keys = [(rows[place], list(rows[:place]).count(rows[place])) for place in mine]
        uniform_bt = uniform_numbers(self._seed, name, keys, self._spec.sampling.max_new_tokens)
        model = self._engine.module
        with self._timed("rollout"), whole_weights(self._engine, self._zero_stage), model.using(POLICY):
            model.policy.model.eval()  # with gradient checkpointing a model in training keeps no cache
            drawn: list[Response] = self._sampler([asked[place] for place in mine], uniform_bt, self._spec.sampling)
            model.policy.model.train()
        rollouts = gather_rollouts(rows, asked, mine, drawn)
        self.timing.tokens["rollout"] = sum(map(len, rollouts.answers))
        return rollouts

    @torch.no_grad()
    def rate(self, prompts: PromptSet, rollouts: Rollouts) -> RolloutScores:
        """What all models say of the answers."""
        found: dict[str, list[tuple[MicroBatch, torch.Tensor]]] = {}
        scores: list[tuple[int, float]] = []
        mine = self._share(range(len(rollouts.rows)), rollouts.lengths)
        closed = rollouts.closed(self._closing)
        with self._timed("score"):
            together = SCORED_TOGETHER if self._models.trained.policy.plain else 1
            for batch in self._batches(rollouts, mine, self._minibatch.micro_batch_size * together):
                told = dict(self._engine("policy", batch, self._spec.sampling.temperature))
                told["reference"] = self._reference_log_probs(batch)
                for name, values_n in told.items():
                    found.setdefault(name, []).append((batch, values_n))
                if self._models.rate is None:
                    whole = batch if closed is rollouts else micro_batch(closed, batch.index, self._device)
                    scores += zip(batch.index, self._scores(whole).tolist(), strict=True)
            if self._models.rate is not None:
                texts = [self.text(rollouts.answers[place]) for place in mine]
                asked = [prompts.row(rollouts.rows[place]) for place in mine]
                scores += zip(mine, self._models.rate(asked, texts), strict=True)
            by_place = dict(all_gather_list(scores))
            scores_b = torch.tensor([by_place[place] for place in range(len(rollouts.rows))])
            log_probs_bt, reference_bt, entropy_bt, values_bt = (
                joined(found[name], rollouts) for name in ("log_probs", "reference", "entropy", "values")
            )
            rated = RolloutScores(log_probs_bt, reference_bt, entropy_bt, values_bt, scores_b)
        self.timing.tokens["score"] = sum(rollouts.lengths)
        return rated

    def aim(self, rollouts: Rollouts, rated: RolloutScores) -> AdvantageTargets:
        """Advantages and returns, from the batch of all workers."""
        spec, mask_bt = self._spec, rollouts.mask_bt
        kl_bt = kl_per_token(rated.log_probs_bt, rated.reference_bt, spec.kl.estimator)
        scores_b = apply_eos_penalty(rated.scores_b, torch.tensor(rollouts.ended), spec.missing_eos_penalty)
        rewards_bt = token_rewards(scores_b, kl_bt, mask_bt, self.state.kl_coefficient)
        if spec.whiten_rewards:
            rewards_bt = whiten(rewards_bt, mask_bt, shift=False)
        advantages_bt, returns_bt = generalized_advantages(
            rewards_bt, rated.values_bt, mask_bt, spec.gamma, spec.gae_lambda
        )
        if spec.whiten_advantages:
            advantages_bt = whiten(advantages_bt, mask_bt)
        return AdvantageTargets(advantages_bt, returns_bt)

    def update(
        self, rollouts: Rollouts, rated: RolloutScores, targets: AdvantageTargets, learning_rate: float
    ) -> dict[str, float]:
        """`ppo_epochs` times over the batch, an optimizer step a minibatch. Losses are means over the tokens of the
        minibatch on all workers, however it is cut into micro batches; steps that were skipped are left out."""
        spec = self._spec
        sums = torch.zeros(5, dtype=torch.float64, device=self._device)
        norms: list[float] = []
        answers, lengths = len(rollouts.rows), rollouts.lengths
        with self._timed("update"):
            for epoch in range(spec.ppo_epochs):
                for number, places in enumerate(
                    minibatches(answers, spec.minibatches, self._seed, self.state.step, epoch)
                ):
                    tokens = sum(len(rollouts.answers[place]) for place in places)
                    mine = self._share(places, lengths)
                    mixed = self._mixing(epoch, number)
                    own, own_loss = torch.zeros_like(sums), torch.zeros((), device=self._device)
                    for batch in self._batches(rollouts, mine, self._minibatch.micro_batch_size):
                        loss, parts = self._loss(batch, rated, targets)
                        # DeepSpeed means over micro batches and workers; here it is a sum over all, divided once.
                        loss = loss / tokens * self._minibatch.accumulation * self._workers
                        if mixed is not None:
                            loss = loss + next(mixed)
                        self._engine.backward(loss)
                        self._engine.step()
                        own += parts
                        own_loss += loss.detach()
                    norm, skipped = step_result(self._engine)
                    if self.guard.check_step(
                        self.state.step + 1,
                        loss=mean_over_ranks(float(own_loss)),
                        grad_norm=norm,
                        learning_rate=learning_rate,
                        skipped=skipped,
                    ):
                        continue
                    sums += own
                    if norm is not None:
                        norms.append(norm)
        dist.all_reduce(sums)
        self.timing.tokens["update"] = sum(lengths) * spec.ppo_epochs
        policy, value, clipped, kl, count = sums.tolist()
        count = count or 1.0  # every step of it was skipped
        told = {
            "policy_loss": policy / count,
            "value_loss": value / count,
            "clip_fraction": clipped / count,
            "approximate_kl": kl / count,
        }
        if norms:  # before they were clipped; DeepSpeed (0.19.8) tells none under ZeRO-0 in fp32
            told["grad_norm"] = sum(norms) / len(norms)
        return told

    def kl(self, rollouts: Rollouts, rated: RolloutScores) -> torch.Tensor:
        """(answers,): nats an answer, by the estimator k1, whatever the penalty's is."""
        kl_bt = kl_per_token(rated.log_probs_bt, rated.reference_bt, "k1")
        return torch.where(rollouts.mask_bt, kl_bt, 0.0).sum(dim=1)

    @torch.no_grad()
    def loss_of(self, ids: Sequence[int]) -> float:
        """Of the policy, in nats per token of a sequence. All workers take part: ZeRO-3 gathers weights from all."""
        whole = Rollouts([0], [list(ids[:1])], [list(ids[1:])], [True], [])
        log_probs_n = self._engine("language", micro_batch(whole, [0], self._device))["log_probs"]
        return -float(log_probs_n.float().mean())

    def text(self, answer: Sequence[int]) -> str:
        return decode_response(answer, self._end, self._tokenizer)

    def _loss(
        self, batch: MicroBatch, rated: RolloutScores, targets: AdvantageTargets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The sum over the tokens of a micro batch; and sums of policy loss, value loss, clipped tokens, approximate
        KL, and tokens, (5,) in float64."""
        spec = self._spec
        told = self._engine("policy", batch, spec.sampling.temperature, spec.entropy_coefficient > 0)
        policy = policy_loss(
            told["log_probs"], batch.of(rated.log_probs_bt), batch.of(targets.advantages_bt), spec.clip
        )
        value_n = value_loss(told["values"], batch.of(rated.values_bt), batch.of(targets.returns_bt), spec.value_clip)
        loss = policy.loss.sum() + spec.value_coefficient * value_n.sum()
        if spec.entropy_coefficient:
            loss = loss - spec.entropy_coefficient * told["entropy"].sum()
        parts = (policy.loss, value_n, policy.clipped, policy.approximate_kl, torch.ones_like(value_n))
        return loss, torch.stack([part.detach().double().sum() for part in parts])

    def _mixing(self, epoch: int, number: int) -> Iterator[torch.Tensor] | None:
        """The loss that is mixed in, a micro batch at a time: as many rows a minibatch as it has answers."""
        if self._mixed is None:
            return None
        size, done = self._minibatch.global_batch_size, self.state.step * self._spec.ppo_epochs + epoch
        start = (done * self._spec.minibatches + number) * size
        return self._mixed_losses(*self._mixed(start, size))

    def _mixed_losses(self, prompts: list[list[int]], answers: list[list[int]]) -> Iterator[torch.Tensor]:
        assert self._spec.ptx is not None, "there are mixed rows"
        size, coefficient = len(prompts), self._spec.ptx.coefficient
        rows = Rollouts(list(range(size)), prompts, answers, [True] * size, [])
        scale = coefficient / sum(map(len, answers)) * self._minibatch.accumulation * self._workers
        mine = self._share(range(size), rows.lengths)
        for batch in self._batches(rows, mine, self._minibatch.micro_batch_size):
            yield -self._engine("language", batch)["log_probs"].sum() * scale

    def _reference_log_probs(self, batch: MicroBatch) -> torch.Tensor:
        if self._models.trained.shared:
            shared_n: torch.Tensor = self._engine("reference", batch, self._spec.sampling.temperature)["log_probs"]
            return shared_n
        own_n: torch.Tensor = self._reference(batch, self._spec.sampling.temperature)[0]
        return own_n

    def _scores(self, batch: MicroBatch) -> torch.Tensor:
        """(rows,), where a model reads the tokens."""
        if self._reward is not None:
            own_b: torch.Tensor = self._reward(batch.ids_bs, batch.last_b)
            return own_b
        shared_b: torch.Tensor = self._engine("reward", batch)["scores"]
        return shared_b

    def _share(self, places: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """This worker's, as many as every other's: under ZeRO-3 a forward pass gathers weights from all. Where they
        don't come out even the first place is taken twice, which changes nothing: what is found of it is the same."""
        even = [*places, *[places[0]] * (-len(places) % self._workers)]
        return shard_by_length(even, lengths, self._rank, self._workers)

    def _batches(self, rollouts: Rollouts, places: Sequence[int], size: int) -> Iterator[MicroBatch]:
        for start in range(0, len(places), size):
            yield micro_batch(rollouts, places[start : start + size], self._device)

    def _timed(self, phase: Phase) -> _Timed:
        return _Timed(self.timing.seconds, phase, self._device)


class _Timed:
    def __init__(self, seconds: dict[Phase, float], phase: Phase, device: torch.device) -> None:
        self._seconds, self._phase, self._device = seconds, phase, device

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + time.perf_counter() - self._begin


def learning_rate_at(step: int, steps: int, spec: Ppo) -> float:
    """Of the step with this number, from 0 on: warm-up, then the schedule down to zero behind the last step. As in
    transformers, but for the first step of a warm-up, which has a rate: a batch of answers costs too much for none."""
    peak = values_by_step("learning_rate", spec, steps)[step]
    warmup = round(spec.warmup * steps)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    shape: dict[str, Callable[[float], float]] = {
        "constant": lambda done: 1.0,
        "linear": lambda done: 1 - done,
        "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    }
    return peak * shape[spec.schedule](done)


def _padded(rollouts: Rollouts) -> torch.Tensor:
    """The sampler's log-probabilities, (answers, longest answer)."""
    mask_bt = rollouts.mask_bt
    drawn_bt = torch.zeros(mask_bt.shape)
    drawn_bt[mask_bt] = torch.tensor([value for row in rollouts.drawn for value in row])
    return drawn_bt
