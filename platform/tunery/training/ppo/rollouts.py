"""A batch of answers, and how workers share the work on it.

Every worker draws and rates its share, and then holds the whole batch: tokens and a few numbers a token, which is
little beside a model. So whatever looks at a whole batch (whitening, the adaptive KL coefficient, which answers make a
minibatch) is worked out by every worker from the same numbers, and comes out the same for any number of workers.
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
    """Answers to the prompts of a step, in the step's order."""

    rows: list[int]
    """Which prompt each answers, of all prompts of the training."""
    prompts: list[list[int]]
    answers: list[list[int]]
    """With the end token, where it was drawn. Never empty."""
    ended: list[bool]
    drawn: list[list[float]]
    """The sampler's log-probability of each token."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt and answer."""
        return [len(prompt) + len(answer) for prompt, answer in zip(self.prompts, self.answers, strict=True)]

    def closed(self, closing: Sequence[int]) -> Rollouts:
        """With what the chat template puts behind an answer that has ended: a reward model was trained to be read at
        the last token of that."""
        if not closing:
            return self
        whole = [
            answer + list(closing) if ended else answer for answer, ended in zip(self.answers, self.ended, strict=True)
        ]
        return dataclasses.replace(self, answers=whole)

    @property
    def mask_bt(self) -> torch.Tensor:
        """(answers, longest answer): True on its tokens."""
        lengths_b = torch.tensor([len(answer) for answer in self.answers])
        return torch.arange(int(lengths_b.max()))[None, :] < lengths_b[:, None]


@dataclass(frozen=True)
class RolloutScores:
    """What the models say of the answers, float32 on the CPU; (answers, longest answer) but for the scores, 0 off an
    answer's tokens."""

    log_probs_bt: torch.Tensor
    """Under the policy that drew them, by a forward pass as in the update: a sampler that rounds otherwise (bf16,
    another engine) must not look like a change of the policy."""
    reference_bt: torch.Tensor
    entropy_bt: torch.Tensor
    values_bt: torch.Tensor
    scores_b: torch.Tensor
    """(answers,): of the reward model or function."""


@dataclass(frozen=True)
class MicroBatch:
    """Answers that share a forward pass: prompt and answer, padded on the right.

    No attention mask is needed: under causal attention a token never sees the padding behind it. What is worked out of
    the answers' tokens is flat, (tokens,), one answer after another: padding is not in it, so it can't count.
    """

    index: list[int]
    """Of the answers, in the batch."""
    ids_bs: torch.Tensor
    """(rows, longest), int64."""
    places_n: torch.Tensor
    """(tokens,), int64: the state before each token of the answers, in the flattened (rows x longest) of hidden states;
    its distribution is over that token, its value that of the state in which it is drawn."""
    last_b: torch.Tensor
    """(rows,), int64: each answer's last token, there."""
    mask_bt: torch.Tensor
    """(rows, longest answer): True on the answers' tokens; on the CPU."""

    @property
    def tokens_n(self) -> torch.Tensor:
        """The answers' tokens."""
        return self.ids_bs.flatten()[self.places_n + 1]

    def of(self, values_bt: torch.Tensor) -> torch.Tensor:
        """(tokens,): of a tensor of the whole batch what belongs to the answers here, on their device."""
        return values_bt[self.index, : self.mask_bt.shape[1]][self.mask_bt].to(self.ids_bs.device)


def micro_batch(rollouts: Rollouts, index: Sequence[int], device: torch.device) -> MicroBatch:
    prompts, answers = [rollouts.prompts[i] for i in index], [rollouts.answers[i] for i in index]
    longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(index), longest, dtype=torch.int64)
    places: list[int] = []
    last: list[int] = []
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        first = row * longest + len(prompt) - 1
        places += range(first, first + len(answer))
        last.append(first + len(answer))
    lengths_b = torch.tensor([len(answer) for answer in answers])
    return MicroBatch(
        list(index),
        ids.to(device),
        torch.tensor(places, device=device),
        torch.tensor(last, device=device),
        torch.arange(int(lengths_b.max()))[None, :] < lengths_b[:, None],
    )


def shard_by_length(items: Sequence[int], lengths: Sequence[int], rank: int, workers: int) -> list[int]:
    """A worker's part of `items`, longest first: workers take turns along the order by length, so that their loads are
    alike and rows of like length are neighbours."""
    return sorted(items, key=lambda item: (-lengths[item], item))[rank::workers]


def minibatches(answers: int, count: int, seed: int, step: int, epoch: int) -> list[list[int]]:
    """The batch cut at random into `count` equal parts, otherwise in every epoch, alike on every worker."""
    order = list(range(answers))
    random.Random(f"{seed}-{step}-{epoch}").shuffle(order)
    size = answers // count
    return [order[start : start + size] for start in range(0, size * count, size)]


def gather_rollouts(
    rows: Sequence[int], prompts: Sequence[list[int]], mine: Sequence[int], drawn: Sequence[Response]
) -> Rollouts:
    """The whole batch from every worker's answers. rows, prompts: of the step; mine: places in it that this worker
    answered."""
    answers: dict[int, Response] = dict(all_gather_list(list(zip(mine, drawn, strict=True))))
    whole = [answers[place] for place in range(len(rows))]
    return Rollouts(
        list(rows),
        list(prompts),
        [answer.tokens for answer in whole],
        [answer.ended for answer in whole],
        [answer.log_probs for answer in whole],
    )


def all_gather_list(mine: list[Any]) -> list[Any]:
    """Everybody's items, one worker's after another."""
    found: list[list[Any]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, mine)
    return [item for theirs in found for item in theirs]


def joined(mine: Sequence[tuple[MicroBatch, torch.Tensor]], rollouts: Rollouts) -> torch.Tensor:
    """(answers, longest answer) in float32 on the CPU, from what every worker has of its micro batches, (tokens,) each;
    0 off the answers' tokens."""
    parts = all_gather_list([(batch.index, batch.mask_bt, values_n.float().cpu()) for batch, values_n in mine])
    whole_bt = torch.zeros(rollouts.mask_bt.shape)
    for index, mask_bt, values_n in parts:
        values_bt = torch.zeros(mask_bt.shape)
        values_bt[mask_bt] = values_n
        whole_bt[index, : mask_bt.shape[1]] = values_bt
    return whole_bt
