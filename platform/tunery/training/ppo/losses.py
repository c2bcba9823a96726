"""Clipped PPO losses per token (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7).

Losses are per token and not averaged: the caller sums over micro batches and divides by the number of tokens of the
minibatch on all workers. TRL averages each micro batch over its own tokens instead, so the weight of a token depends on
the micro batches. With one worker and one micro batch per minibatch both are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class PolicyLoss:
    """One value per token, in the shape of the arguments of `policy_loss`."""

    loss: torch.Tensor
    clipped: torch.Tensor
    """1.0 where the clipped loss is larger, so that the token has no gradient; otherwise 0.0."""
    approximate_kl: torch.Tensor
    """KL between old and new policy: half the squared log-ratio (k2 in http://joschu.net/blog/kl-approx.html)."""


def policy_loss(
    log_probs: torch.Tensor, old_log_probs: torch.Tensor, advantages: torch.Tensor, clip: float
) -> PolicyLoss:
    """Return the clipped policy loss of each token. All tensors have one value per token.

    old_log_probs: log-probabilities under the policy that sampled the tokens; clip: maximum change of the probability
    ratio.
    """
    log_ratio = log_probs - old_log_probs
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return PolicyLoss(torch.maximum(unclipped, clipped), (clipped > unclipped).float(), 0.5 * log_ratio.detach() ** 2)


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Return half the squared error of the value of each token. With `clip`, the value is also clipped to within `clip`
    of its old value, and the larger of both errors counts."""
    loss = (values - returns) ** 2
    if clip is not None:
        clipped_values = old_values + (values - old_values).clamp(-clip, clip)
        loss = torch.maximum(loss, (clipped_values - returns) ** 2)
    return 0.5 * loss
