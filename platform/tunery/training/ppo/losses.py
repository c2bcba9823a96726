"""Clipped PPO losses per token (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7).

Losses are per token and not averaged: the caller sums over micro batches and divides by the number of tokens of the
minibatch on all workers. TRL averages each micro batch over its own tokens instead, so that a token's weight depends on
the batching; with one worker and one micro batch per minibatch the two are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PolicyLoss:
    """Per-token tensors in the shape of the arguments of `policy_loss`."""

    loss: torch.Tensor
    clipped: torch.Tensor
    """1 where the clipped loss is larger, so that the token has no gradient."""
    approximate_kl: torch.Tensor
    """KL between old and new policy: half the squared log-ratio (k2)."""


def policy_loss(log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float) -> PolicyLoss:
    """Clipped policy loss; all tensors have one value per token. `old`: log-probabilities under the sampling policy."""
    log_ratio = log_probs - old
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return PolicyLoss(torch.maximum(unclipped, clipped), (clipped > unclipped).float(), 0.5 * log_ratio.detach() ** 2)


def value_loss(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float | None) -> torch.Tensor:
    """Half the squared error of each token's value. With `clip`, the larger of it and the error of the value clipped to
    within `clip` of its old value."""
    loss = (values - returns) ** 2
    if clip is not None:
        clipped_values = old + (values - old).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped_values - returns) ** 2)
    return 0.5 * loss
