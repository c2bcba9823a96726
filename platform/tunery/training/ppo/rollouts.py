"""Batches of rollouts, and their distribution over workers.

Each worker generates and scores its share. All workers then hold the complete batch (token ids and a few floats per
token, little memory compared with a model), so batch statistics such as whitening, the adaptive KL coefficient and the
minibatch split are computed by every worker from the same numbers and do not depend on the number of workers.
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
    """Responses to the prompts of a step, in the step's order."""

    rows: list[int]
    """Index of each response's prompt among all training prompts."""
    prompts: list[list[int]]
    responses: list[list[int]]
    """Token ids, including the EOS token if it was sampled. Never empty."""
    ended: list[bool]
    """Whether the response ends with an EOS token."""
    sampler_log_probs: list[list[float]]
    """The sampler's log-probability of each response token."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt and response."""
        return [len(prompt) + len(response) for prompt, response in zip(self.prompts, self.responses, strict=True)]

    def with_template_suffix(self, suffix: Sequence[int]) -> Rollouts:
        """Append the chat template's `suffix` after EOS to the responses that ended: reward models are trained to be
        read at its last token."""
        if not suffix:
            return self
        responses = [
            response + list(suffix) if ended else response
            for response, ended in zip(self.responses, self.ended, strict=True)
        ]
        return dataclasses.replace(self, responses=responses)

    @property
    def mask_bt(self) -> torch.Tensor:
        """(responses, max response length): True on response tokens."""
        lengths_b = torch.tensor([len(response) for response in self.responses])
        return torch.arange(int(lengths_b.max()))[None, :] < lengths_b[:, None]


@dataclass(frozen=True)
class RolloutScores:
    """Model outputs for the responses, float32 on the CPU: (responses, max response length), 0 on padding, except
    `scores_b`."""

    log_probs_bt: torch.Tensor
    """Under the policy that sampled them, from the same forward pass as in the update. The sampler's own
    log-probabilities may be rounded differently (bf16, another engine), which would look like a policy change."""
    reference_bt: torch.Tensor
    entropy_bt: torch.Tensor
    values_bt: torch.Tensor
    scores_b: torch.Tensor
    """(responses,): output of the reward model or function."""


@dataclass(frozen=True)
class MicroBatch:
    """Prompts and responses of one forward pass, padded on the right.

    Right padding needs no attention mask under causal attention. Per-token results are flat, (tokens,), one response
    after another and without padding.
    """

    index: list[int]
    """Indices of the responses in the batch."""
    ids_bs: torch.Tensor
    """(rows, max length), int64."""
    state_indices_n: torch.Tensor
    """(tokens,), int64: index of the hidden state that predicts each response token, in the flattened (rows x max
    length). The token's log-probability and value are computed from this state."""
    last_b: torch.Tensor
    """(rows,), int64: index of each response's last token, in the same flattened order."""
    mask_bt: torch.Tensor
    """(rows, max response length): True on response tokens; on the CPU."""

    @property
    def tokens_n(self) -> torch.Tensor:
        """Response tokens, (tokens,)."""
        return self.ids_bs.flatten()[self.state_indices_n + 1]

    def select(self, values_bt: torch.Tensor) -> torch.Tensor:
        """Select this micro batch's response tokens from a tensor of the complete batch: (tokens,), on the device of
        `ids_bs`."""
        return values_bt[self.index, : self.mask_bt.shape[1]][self.mask_bt].to(self.ids_bs.device)


def micro_batch(rollouts: Rollouts, index: Sequence[int], device: torch.device) -> MicroBatch:
    """Build the micro batch of the responses `index`, padded on the right."""
    prompts, responses = [rollouts.prompts[i] for i in index], [rollouts.responses[i] for i in index]
    max_length = max(len(prompt) + len(response) for prompt, response in zip(prompts, responses, strict=True))
    ids = torch.zeros(len(index), max_length, dtype=torch.int64)
    state_indices: list[int] = []
    last: list[int] = []
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids[row, : len(prompt) + len(response)] = torch.tensor(prompt + response)
        first = row * max_length + len(prompt) - 1
        state_indices += range(first, first + len(response))
        last.append(first + len(response))
    lengths_b = torch.tensor([len(response) for response in responses])
    return MicroBatch(
        list(index),
        ids.to(device),
        torch.tensor(state_indices, device=device),
        torch.tensor(last, device=device),
        torch.arange(int(lengths_b.max()))[None, :] < lengths_b[:, None],
    )


def shard_by_length(items: Sequence[int], lengths: Sequence[int], rank: int, workers: int) -> list[int]:
    """Return a worker's share of `items`, by descending length. Workers take turns along that order, so that they get
    similar loads and rows of similar length are batched together."""
    return sorted(items, key=lambda item: (-lengths[item], item))[rank::workers]


def minibatches(num_responses: int, count: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """Split the batch at random into `count` equal minibatches: differently in each epoch, the same on all workers."""
    order = list(range(num_responses))
    random.Random(f"{seed}-{step}-{epoch}").shuffle(order)
    size = num_responses // count
    return [order[start : start + size] for start in range(0, size * count, size)]


def gather_rollouts(
    rows: Sequence[int],
    prompts: Sequence[list[int]],
    local_indices: Sequence[int],
    local_responses: Sequence[Response],
) -> Rollouts:
    """Gather the complete batch from the responses of all workers. rows, prompts: of the step; local_indices: indices
    of this worker's responses among them."""
    by_index: dict[int, Response] = dict(all_gather_list(list(zip(local_indices, local_responses, strict=True))))
    responses = [by_index[index] for index in range(len(rows))]
    return Rollouts(
        list(rows),
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
    """Gather per-token values, (tokens,) per micro batch of each worker, into (responses, max response length), float32
    on the CPU, 0 on padding."""
    parts = all_gather_list([(batch.index, batch.mask_bt, values_n.float().cpu()) for batch, values_n in local])
    full_bt = torch.zeros(rollouts.mask_bt.shape)
    for index, mask_bt, values_n in parts:
        values_bt = torch.zeros(mask_bt.shape)
        values_bt[mask_bt] = values_n
        full_bt[index, : mask_bt.shape[1]] = values_bt
    return full_bt
