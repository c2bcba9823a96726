"""Batches of rollouts, and their distribution over workers.

Each worker generates and scores its share. Then all workers gather the complete batch: token ids and a few floats per
token, which take little memory compared with a model. Every worker computes whitening, the adaptive KL coefficient and
the split into minibatches from the complete batch, so they do not depend on the number of workers.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from tunery.models.generate import Response


@dataclass(frozen=True)
class Rollouts:
    """Responses to the prompts of a step: one entry per response, in the order of the step."""

    prompt_indices: list[int]
    """Index of the prompt among all prompts of the training (or of the evaluation)."""
    prompts: list[list[int]]
    """Token ids of the prompt."""
    responses: list[list[int]]
    """Token ids of the response, including the EOS token if it was sampled. Never empty."""
    ended: list[bool]
    """Whether the response ends with an EOS token."""
    sampler_log_probs: list[list[float]]
    """Log-probability of each response token as computed by the sampler."""

    @property
    def lengths(self) -> list[int]:
        """Number of tokens of prompt and response."""
        return [len(prompt) + len(response) for prompt, response in zip(self.prompts, self.responses, strict=True)]

    def with_template_suffix(self, suffix: Sequence[int]) -> Rollouts:
        """Append `suffix`, the tokens that the chat template adds after EOS, to the responses that ended. Reward models
        are trained on conversations with this suffix, and give their reward at its last token."""
        if not suffix:
            return self
        responses = [
            response + list(suffix) if ended else response
            for response, ended in zip(self.responses, self.ended, strict=True)
        ]
        return dataclasses.replace(self, responses=responses)

    @property
    def mask_bt(self) -> torch.Tensor:
        """(responses, max response length) bool, True on response tokens; on the CPU."""
        lengths_b = torch.tensor([len(response) for response in self.responses])
        return torch.arange(int(lengths_b.max()))[None, :] < lengths_b[:, None]


@dataclass(frozen=True)
class RolloutScores:
    """Model outputs for the responses, float32 on the CPU. Per-token tensors are (responses, max response length), 0 on
    padding."""

    log_probs_bt: torch.Tensor
    """Log-probabilities under the policy that sampled the tokens, computed as in the update. Those of the sampler may
    be rounded differently (bf16, another engine), which would look like a change of the policy."""
    reference_bt: torch.Tensor
    """Log-probabilities under the reference."""
    entropy_bt: torch.Tensor
    """Entropy of the policy at each token, in nats."""
    values_bt: torch.Tensor
    """Value of the state before each token."""
    scores_b: torch.Tensor
    """(responses,), output of the reward model or function."""


@dataclass(frozen=True)
class MicroBatch:
    """Prompts and responses of one forward pass, padded on the right.

    Causal attention needs no attention mask for padding on the right. Results per token are flat, (tokens,): one
    response after another, without padding.
    """

    indices: list[int]
    """Indices of the responses in the complete batch."""
    ids_bs: torch.Tensor
    """(responses, max length) int64, token ids of prompts and responses."""
    state_indices_n: torch.Tensor
    """(tokens,) int64, index in the flattened `ids_bs` of the token before each response token. Its hidden state
    predicts the response token; log-probability and value are computed from it."""
    last_b: torch.Tensor
    """(responses,) int64, index in the flattened `ids_bs` of the last token of each response."""
    mask_bt: torch.Tensor
    """(responses, max response length) bool, True on response tokens; on the CPU."""

    @property
    def tokens_n(self) -> torch.Tensor:
        """(tokens,) int64, ids of the response tokens."""
        return self.ids_bs.flatten()[self.state_indices_n + 1]

    def select(self, values_bt: torch.Tensor) -> torch.Tensor:
        """Return the values of this micro batch's response tokens, (tokens,) on the device of `ids_bs`. values_bt: of
        the complete batch, (responses, max response length)."""
        return values_bt[self.indices, : self.mask_bt.shape[1]][self.mask_bt].to(self.ids_bs.device)


def micro_batch(rollouts: Rollouts, indices: Sequence[int], device: torch.device) -> MicroBatch:
    """Build the micro batch of the responses with these indices."""
    prompts = [rollouts.prompts[index] for index in indices]
    responses = [rollouts.responses[index] for index in indices]
    max_length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(indices), max_length, dtype=torch.int64)
    state_indices: list[int] = []
    last_indices: list[int] = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        first = row * max_length + len(prompt) - 1
        state_indices += range(first, first + len(response))
        last_indices.append(first + len(response))
    lengths_b = torch.tensor([len(response) for response in responses])
    return MicroBatch(
        list(indices),
        ids.to(device),
        torch.tensor(state_indices, device=device),
        torch.tensor(last_indices, device=device),
        torch.arange(int(lengths_b.max()))[None, :] < lengths_b[:, None],
    )


def shard_by_length(indices: Sequence[int], lengths: Sequence[int], rank: int, workers: int) -> list[int]:
    """Return a worker's share of `indices`, by descending length. The sorted indices are dealt out in turn, so workers
    get similar loads, and responses of similar length share a micro batch."""
    return sorted(indices, key=lambda index: (-lengths[index], index))[rank::workers]


def minibatches(num_responses: int, count: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """Split the indices of a batch at random into `count` equal minibatches: differently in each step and epoch, the
    same on all workers."""
    order = list(range(num_responses))
    random.Random(f"{seed}-{step}-{epoch}").shuffle(order)
    size = num_responses // count
    return [order[start : start + size] for start in range(0, size * count, size)]


def gather_rollouts(
    prompt_indices: Sequence[int],
    prompts: Sequence[list[int]],
    local_indices: Sequence[int],
    local_responses: Sequence[Response],
) -> Rollouts:
    """Gather the complete batch from the responses of all workers.

    prompt_indices, prompts: those of the step; local_indices: which of them this worker has generated responses to.
    """
    by_index: dict[int, Response] = dict(all_gather_list(list(zip(local_indices, local_responses, strict=True))))
    responses = [by_index[index] for index in range(len(prompt_indices))]
    return Rollouts(
        list(prompt_indices),
        list(prompts),
        [response.tokens for response in responses],
        [response.ended for response in responses],
        [response.log_probs for response in responses],
    )


def all_gather_list(local_items: list[Any]) -> list[Any]:
    """Return the items of all workers, in rank order."""
    gathered: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, local_items)
    return [item for items in gathered for item in items]


def gather_token_values(local: Sequence[tuple[MicroBatch, torch.Tensor]], rollouts: Rollouts) -> torch.Tensor:
    """Gather values per token from all workers, as (responses, max response length) float32 on the CPU, 0 on padding.
    local: this worker's micro batches, with the values of each, (tokens,)."""
    gathered = all_gather_list([(batch.indices, batch.mask_bt, values_n.float().cpu()) for batch, values_n in local])
    complete_bt = torch.zeros(rollouts.mask_bt.shape)
    for indices, mask_bt, values_n in gathered:
        values_bt = torch.zeros(mask_bt.shape)
        values_bt[mask_bt] = values_n
        complete_bt[indices, : mask_bt.shape[1]] = values_bt
    return complete_bt
