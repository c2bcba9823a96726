"""A PPO step: generate rollouts, score them, compute advantages, update the policy and the value model.

Each worker generates and scores responses to its share of the prompts. Then all workers gather the complete batch
(rollouts.py), and each trains on its share of every minibatch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
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
from tunery.training.job import Job
from tunery.training.ppo.advantages import explained_variance, generalized_advantages, masked_mean, whiten
from tunery.training.ppo.build import Models
from tunery.training.ppo.engine import PpoEngines, gathered_policy, set_hyperparams
from tunery.training.ppo.kl import adapt_kl_coef, apply_eos_penalty, kl_per_token, token_rewards
from tunery.training.ppo.losses import policy_loss, value_loss
from tunery.training.ppo.models import POLICY
from tunery.training.ppo.ptx import PtxData
from tunery.training.ppo.rollouts import (
    MicroBatch,
    Rollouts,
    RolloutScores,
    all_gather_list,
    gather_rollouts,
    gather_token_values,
    micro_batch,
    minibatches,
    shard_by_length,
)
from tunery.training.ppo.sanity_checks import check_kl, check_rewards_differ
from tunery.training.schedule import build_schedule
from tunery.training.sequences import PromptSet
from tunery.training.training_stats import SKIPPED_STEPS

Phase = Literal["rollout", "score", "update"]
SCORING_BATCH_FACTOR = 4
"""Number of micro batches per forward pass in scoring, which keeps no activations for a backward pass. Models that
compute the logits of all tokens at once get one."""


@dataclass
class PpoState:
    """The state of PPO besides weights and optimizer. Every checkpoint contains it."""

    step: int = 0
    """Number of finished steps."""
    kl_coefficient: float = 0.0
    reward_min: float = math.inf
    """Smallest reward of all responses so far, after `missing_eos_penalty`."""
    reward_max: float = -math.inf
    """Largest reward of all responses so far, after `missing_eos_penalty`."""

    def as_json(self) -> dict[str, float]:
        """Return the JSON object that checkpoints contain."""
        return {
            "step": self.step,
            "kl_coefficient": self.kl_coefficient,
            "reward_min": self.reward_min,
            "reward_max": self.reward_max,
        }

    @staticmethod
    def from_json(state: Mapping[str, Any]) -> PpoState:
        return PpoState(state["step"], state["kl_coefficient"], state["reward_min"], state["reward_max"])


@dataclass
class PhaseStats:
    """Time and throughput of the phases of a step."""

    seconds: dict[Phase, float] = field(default_factory=dict)
    """Seconds of this worker."""
    tokens: dict[Phase, int] = field(default_factory=dict)
    """Tokens of all workers."""


@dataclass(frozen=True)
class AdvantageTargets:
    """Targets of the update, each (responses, max response length) float32 on the CPU, 0 on padding."""

    advantages_bt: torch.Tensor
    """For the policy."""
    returns_bt: torch.Tensor
    """For the value model."""


@dataclass(frozen=True)
class PpoBatches:
    """Batch sizes, in responses."""

    step: Batching
    """Of a PPO step: one batch of responses."""
    minibatch: Batching
    """Of an optimizer step."""


@dataclass(frozen=True)
class PpoData:
    """The training prompts and the rows of `ptx`, with their tokenizer."""

    prompts: PromptSet
    ptx: PtxData | None
    tokenizer: Any
    eos_token_ids: Sequence[int]
    """Tokens that end a response."""


class PpoTrainer:
    """Takes PPO steps. Every worker has one, and all call the same methods in the same order."""

    def __init__(
        self, job: Job, models: Models, engines: PpoEngines, batches: PpoBatches, data: PpoData, guard: DivergenceGuard
    ) -> None:
        """engines: those of `models`; guard: checks every optimizer step."""
        assert isinstance(job.spec, Ppo)
        self._stage, self._spec, self._seed, self._zero_stage = job.stage, job.spec, job.seed, job.compute.zero_stage
        self._models, self._engine = models, engines.trained
        self._reference, self._reward = engines.reference, engines.reward
        self._steps, self._minibatch = batches.step.steps, batches.minibatch
        self._schedule = build_schedule(job.spec, self._steps)
        self._prompts, self._ptx_data, self._tokenizer = data.prompts, data.ptx, data.tokenizer
        self._rank, self._workers = dist.get_rank(), dist.get_world_size()
        self._device = torch.device(self._engine.device)
        self._sampler = TransformersEngine(self._engine.module.policy.model, data.eos_token_ids)
        self._eos_token_ids = set(data.eos_token_ids)
        self._template_suffix = template_suffix_ids(data.tokenizer, self._eos_token_ids)
        self.state = PpoState(kl_coefficient=job.spec.kl.coefficient)
        self._guard = guard
        self.phase_stats = PhaseStats()

    def step(self, prompt_indices: Sequence[int]) -> dict[str, float]:
        """Generate one response to each of these prompts, train on them and return the metrics of the step. Raises
        StageError if the training has diverged, or if a sanity check fails."""
        spec, state = self._spec, self.state
        self.phase_stats = PhaseStats()
        step, skipped_before = state.step + 1, self._guard.skipped_steps
        rollouts = self.generate_rollouts(self._prompts, prompt_indices, f"step {state.step}")
        scores = self.score_rollouts(self._prompts, rollouts)
        kl_b = self.sequence_kl(rollouts, scores)
        kl, reward = float(kl_b.mean()), float(scores.scores_b.mean())
        check_finite(self._stage, step, reward=reward, kl=kl, mean_value=float(scores.values_bt.mean()))
        check_kl(self._stage, step, kl, spec.kl.max_kl)
        rewards_b = apply_eos_penalty(scores.scores_b, torch.tensor(rollouts.ended), spec.missing_eos_penalty)
        num_responses = len(rollouts.responses)
        state.reward_min = min(state.reward_min, float(rewards_b.min()))
        state.reward_max = max(state.reward_max, float(rewards_b.max()))
        check_rewards_differ(self._stage, state.reward_min, state.reward_max, step * num_responses, step == self._steps)
        targets = self.compute_advantages(rollouts, scores)
        learning_rate = self._schedule.learning_rates[state.step]
        set_hyperparams(self._engine, learning_rate, self._schedule.weight_decays[state.step])
        update_metrics = self.update(rollouts, scores, targets, learning_rate)
        check_finite(self._stage, step, learning_rate=learning_rate, **update_metrics)
        mask_bt = rollouts.mask_bt
        sampler_diff_bt = (scores.log_probs_bt - _padded_sampler_log_probs(rollouts)).abs()
        metrics = {
            "reward": reward,
            "reward_std": float(scores.scores_b.std(correction=0)),
            "kl": kl,
            "kl_coefficient": state.kl_coefficient,
            "entropy": float(masked_mean(scores.entropy_bt, mask_bt)),
            **update_metrics,
            "explained_variance": explained_variance(scores.values_bt, targets.returns_bt, mask_bt),
            "returns": float(masked_mean(targets.returns_bt, mask_bt)),
            "response_length": float(mask_bt.sum(dim=1).float().mean()),
            "eos_rate": sum(rollouts.ended) / len(rollouts.ended),
            "sampler_logprob_diff": float(masked_mean(sampler_diff_bt, mask_bt)),
            "learning_rate": learning_rate,
        }
        if self._guard.skipped_steps > skipped_before:
            metrics[SKIPPED_STEPS] = float(self._guard.skipped_steps)
        if spec.kl.target is not None:
            state.kl_coefficient = adapt_kl_coef(
                state.kl_coefficient, kl, spec.kl.target, spec.kl.horizon, num_responses
            )
        state.step = step
        return metrics

    def generate_rollouts(self, prompts: PromptSet, prompt_indices: Sequence[int], name: str) -> Rollouts:
        """Sample a response to each of these prompts.

        The random numbers of a response depend only on the seed, `name`, the index of the prompt, and how often the
        index occurred before in `prompt_indices`, not on the number of workers.
        """
        prompt_ids = [prompts.ids(int(index)) for index in prompt_indices]
        local = self._shard(range(len(prompt_ids)), [len(ids) for ids in prompt_ids])
        keys = [(prompt_indices[index], list(prompt_indices[:index]).count(prompt_indices[index])) for index in local]
        uniform_bt = uniform_numbers(self._seed, name, keys, self._spec.sampling.max_new_tokens)
        model = self._engine.module
        with self._timed("rollout"), gathered_policy(self._engine, self._zero_stage), model.with_adapter(POLICY):
            model.policy.model.eval()  # in training mode, gradient checkpointing disables the KV cache
            local_prompts = [prompt_ids[index] for index in local]
            responses: list[Response] = self._sampler(local_prompts, uniform_bt, self._spec.sampling)
            model.policy.model.train()
        rollouts = gather_rollouts(prompt_indices, prompt_ids, local, responses)
        self.phase_stats.tokens["rollout"] = sum(map(len, rollouts.responses))
        return rollouts

    @torch.no_grad()
    def score_rollouts(self, prompts: PromptSet, rollouts: Rollouts) -> RolloutScores:
        """Compute log-probabilities under policy and reference, entropies, values and rewards of the responses.
        `prompts`: those that the prompt indices of the rollouts refer to."""
        outputs: dict[str, list[tuple[MicroBatch, torch.Tensor]]] = {}
        local_rewards: list[tuple[int, float]] = []
        local = self._shard(range(len(rollouts.responses)), rollouts.lengths)
        reward_inputs = rollouts.with_template_suffix(self._template_suffix)
        with self._timed("score"):
            factor = SCORING_BATCH_FACTOR if self._models.trained.policy.log_probs.has_plain_head else 1
            for batch in self._batches(rollouts, local, self._minibatch.micro_batch_size * factor):
                batch_outputs = dict(self._engine("policy", batch, self._spec.sampling.temperature, "value"))
                batch_outputs["reference"] = self._reference_log_probs(batch)
                for name, values_n in batch_outputs.items():
                    outputs.setdefault(name, []).append((batch, values_n))
                if self._models.reward_fn is None:
                    with_suffix = (
                        batch if reward_inputs is rollouts else micro_batch(reward_inputs, batch.indices, self._device)
                    )
                    local_rewards += zip(batch.indices, self._rewards(with_suffix).tolist(), strict=True)
            if self._models.reward_fn is not None:
                texts = [self.decode(rollouts.responses[index]) for index in local]
                prompt_rows = [prompts.row(rollouts.prompt_indices[index]) for index in local]
                local_rewards += zip(local, self._models.reward_fn(prompt_rows, texts), strict=True)
            reward_by_index = dict(all_gather_list(local_rewards))
            scores_b = torch.tensor([reward_by_index[index] for index in range(len(rollouts.responses))])
            log_probs_bt, reference_bt, entropy_bt, values_bt = (
                gather_token_values(outputs[name], rollouts) for name in ("log_probs", "reference", "entropy", "values")
            )
        self.phase_stats.tokens["score"] = sum(rollouts.lengths)
        return RolloutScores(log_probs_bt, reference_bt, entropy_bt, values_bt, scores_b)

    def compute_advantages(self, rollouts: Rollouts, scores: RolloutScores) -> AdvantageTargets:
        """Compute advantages and returns from the complete batch of all workers."""
        spec, mask_bt = self._spec, rollouts.mask_bt
        kl_bt = kl_per_token(scores.log_probs_bt, scores.reference_bt, spec.kl.estimator)
        scores_b = apply_eos_penalty(scores.scores_b, torch.tensor(rollouts.ended), spec.missing_eos_penalty)
        rewards_bt = token_rewards(scores_b, kl_bt, mask_bt, self.state.kl_coefficient)
        if spec.whiten_rewards:
            rewards_bt = whiten(rewards_bt, mask_bt, shift=False)
        advantages_bt, returns_bt = generalized_advantages(
            rewards_bt, scores.values_bt, mask_bt, spec.gamma, spec.gae_lambda
        )
        if spec.whiten_advantages:
            advantages_bt = whiten(advantages_bt, mask_bt)
        return AdvantageTargets(advantages_bt, returns_bt)

    def update(
        self, rollouts: Rollouts, scores: RolloutScores, targets: AdvantageTargets, learning_rate: float
    ) -> dict[str, float]:
        """Train for `ppo_epochs` epochs over the batch, with one optimizer step per minibatch; return the mean losses.

        The loss of an optimizer step is the mean over the tokens of its minibatch on all workers, whatever the micro
        batch size. Skipped steps are left out of the returned means.
        """
        spec = self._spec
        sums = torch.zeros(5, dtype=torch.float64, device=self._device)
        grad_norms: list[float] = []
        num_responses, lengths = len(rollouts.responses), rollouts.lengths
        with self._timed("update"):
            for epoch in range(spec.ppo_epochs):
                for minibatch_index, indices in enumerate(
                    minibatches(num_responses, spec.minibatches, self._seed, self.state.step, epoch)
                ):
                    num_tokens = sum(len(rollouts.responses[index]) for index in indices)
                    local = self._shard(indices, lengths)
                    ptx_losses = self._ptx_losses(epoch, minibatch_index)
                    local_sums, local_loss = torch.zeros_like(sums), torch.zeros((), device=self._device)
                    for batch in self._batches(rollouts, local, self._minibatch.micro_batch_size):
                        loss, batch_sums = self._loss(batch, scores, targets)
                        # DeepSpeed averages over micro batches and workers. Undo that, and divide by the tokens.
                        loss = loss / num_tokens * self._minibatch.gradient_accumulation_steps * self._workers
                        if ptx_losses is not None:
                            loss = loss + next(ptx_losses)
                        self._engine.backward(loss)
                        self._engine.step()
                        local_sums += batch_sums
                        local_loss += loss.detach()
                    grad_norm, skipped = step_result(self._engine)
                    if self._guard.check_step(
                        self.state.step + 1,
                        loss=mean_over_ranks(float(local_loss)),
                        grad_norm=grad_norm,
                        learning_rate=learning_rate,
                        skipped=skipped,
                    ):
                        continue
                    sums += local_sums
                    if grad_norm is not None:
                        grad_norms.append(grad_norm)
        dist.all_reduce(sums)
        self.phase_stats.tokens["update"] = sum(lengths) * spec.ppo_epochs
        policy_loss_sum, value_loss_sum, num_clipped, kl_sum, loss_tokens = sums.tolist()
        loss_tokens = loss_tokens or 1.0  # 0 if every step was skipped
        metrics = {
            "policy_loss": policy_loss_sum / loss_tokens,
            "value_loss": value_loss_sum / loss_tokens,
            "clip_fraction": num_clipped / loss_tokens,
            "approximate_kl": kl_sum / loss_tokens,
        }
        if grad_norms:  # before clipping; DeepSpeed (0.19.8) reports none under ZeRO-0 in fp32
            metrics["grad_norm"] = sum(grad_norms) / len(grad_norms)
        return metrics

    def sequence_kl(self, rollouts: Rollouts, scores: RolloutScores) -> torch.Tensor:
        """Return the KL to the reference of each response in nats, (responses,), by the estimator k1, whatever
        `kl.estimator` is."""
        kl_bt = kl_per_token(scores.log_probs_bt, scores.reference_bt, "k1")
        return torch.where(rollouts.mask_bt, kl_bt, 0.0).sum(dim=1)

    @torch.no_grad()
    def sequence_loss(self, ids: Sequence[int]) -> float:
        """Return the mean loss of the policy on the tokens after the first, in nats. Call on all ranks: ZeRO-3 gathers
        weights."""
        sequence = Rollouts([0], [list(ids[:1])], [list(ids[1:])], [True], [])
        log_probs_n = self._engine("language", micro_batch(sequence, [0], self._device))["log_probs"]
        return -float(log_probs_n.float().mean())

    def decode(self, response: Sequence[int]) -> str:
        """Decode the tokens of a response to text, without the EOS token."""
        return decode_response(response, self._eos_token_ids, self._tokenizer)

    def _loss(
        self, batch: MicroBatch, scores: RolloutScores, targets: AdvantageTargets
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the loss summed over the tokens of a micro batch, and the sums of policy loss, value loss, clipped
        tokens, approximate KL and tokens, (5,) float64."""
        spec = self._spec
        entropy = "gradient" if spec.entropy_coefficient else "none"
        outputs = self._engine("policy", batch, spec.sampling.temperature, entropy)
        policy = policy_loss(
            outputs["log_probs"], batch.select(scores.log_probs_bt), batch.select(targets.advantages_bt), spec.clip
        )
        value_loss_n = value_loss(
            outputs["values"], batch.select(scores.values_bt), batch.select(targets.returns_bt), spec.value_clip
        )
        loss = policy.loss.sum() + spec.value_coefficient * value_loss_n.sum()
        if spec.entropy_coefficient:
            loss = loss - spec.entropy_coefficient * outputs["entropy"].sum()
        statistics = (policy.loss, value_loss_n, policy.clipped, policy.approximate_kl, torch.ones_like(value_loss_n))
        return loss, torch.stack([values_n.detach().double().sum() for values_n in statistics])

    def _ptx_losses(self, epoch: int, minibatch_index: int) -> Iterator[torch.Tensor] | None:
        """Return an iterator over the PTX losses of the micro batches of a minibatch, with as many PTX rows as the
        minibatch has responses; None without `ptx`."""
        if self._ptx_data is None:
            return None
        size, num_epochs = self._minibatch.global_batch_size, self.state.step * self._spec.ppo_epochs + epoch
        start = (num_epochs * self._spec.minibatches + minibatch_index) * size
        return self._micro_batch_ptx_losses(*self._ptx_data(start, size))

    def _micro_batch_ptx_losses(self, prompts: list[list[int]], responses: list[list[int]]) -> Iterator[torch.Tensor]:
        assert self._spec.ptx is not None, "there are PTX rows"
        size, coefficient = len(prompts), self._spec.ptx.coefficient
        sequences = Rollouts(list(range(size)), prompts, responses, [True] * size, [])
        num_tokens = sum(map(len, responses))
        scale = coefficient / num_tokens * self._minibatch.gradient_accumulation_steps * self._workers
        local = self._shard(range(size), sequences.lengths)
        for batch in self._batches(sequences, local, self._minibatch.micro_batch_size):
            yield -self._engine("language", batch)["log_probs"].sum() * scale

    def _reference_log_probs(self, batch: MicroBatch) -> torch.Tensor:
        """Return the log-probabilities of the response tokens under the reference, (tokens,)."""
        temperature = self._spec.sampling.temperature
        log_probs_n: torch.Tensor
        if self._models.trained.shared:
            log_probs_n = self._engine("reference", batch, temperature)["log_probs"]
        else:
            log_probs_n = self._reference(batch, temperature)[0]
        return log_probs_n

    def _rewards(self, batch: MicroBatch) -> torch.Tensor:
        """Return the rewards of a reward model that takes token ids, (responses,)."""
        rewards_b: torch.Tensor
        if self._reward is not None:
            rewards_b = self._reward(batch.ids_bs, batch.last_b)
        else:
            rewards_b = self._engine("reward", batch)["scores"]
        return rewards_b

    def _shard(self, indices: Sequence[int], lengths: Sequence[int]) -> list[int]:
        """Return this worker's share of `indices`. All workers get the same number, since under ZeRO-3 every forward
        pass gathers weights from all workers. The first index is repeated as padding; its results are identical."""
        padded = [*indices, *[indices[0]] * (-len(indices) % self._workers)]
        return shard_by_length(padded, lengths, self._rank, self._workers)

    def _batches(self, rollouts: Rollouts, indices: Sequence[int], batch_size: int) -> Iterator[MicroBatch]:
        for start in range(0, len(indices), batch_size):
            yield micro_batch(rollouts, indices[start : start + batch_size], self._device)

    def _timed(self, phase: Phase) -> _PhaseTimer:
        return _PhaseTimer(self.phase_stats.seconds, phase, self._device)


class _PhaseTimer:
    """A context that adds its duration to `seconds[phase]`. On a GPU it waits until the work is finished."""

    def __init__(self, seconds: dict[Phase, float], phase: Phase, device: torch.device) -> None:
        self._seconds, self._phase, self._device = seconds, phase, device

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *error: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + time.perf_counter() - self._start


def _padded_sampler_log_probs(rollouts: Rollouts) -> torch.Tensor:
    """Return the log-probabilities as computed by the sampler, (responses, max response length), 0 on padding."""
    mask_bt = rollouts.mask_bt
    log_probs_bt = torch.zeros(mask_bt.shape)
    log_probs_bt[mask_bt] = torch.tensor([value for row in rollouts.sampler_log_probs for value in row])
    return log_probs_bt
