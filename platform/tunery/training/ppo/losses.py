"""Clipped PPO losses per token (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7) and entropy.

Losses are per token and not averaged: the caller sums over micro batches and divides by the number of tokens of the
minibatch on all workers. TRL averages each micro batch over its own tokens instead, so that a token's weight depends on
the batching; with one worker and one micro batch per minibatch the two are equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def log_probs_of(
    logits_nv: torch.Tensor, tokens_n: torch.Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token and entropy of its distribution (nats), both (tokens,) in float32.

    logits_nv: (tokens, vocabulary); tokens_n: (tokens,), int64. `temperature` is the sampler's. The sampler's top_p and
    min_new_tokens are not applied: probability ratios are ratios of the model's own distribution. The entropy has a
    gradient only with `entropy_gradient`.
    """
    logits_nv = logits_nv.float() / temperature
    norm_n = logits_nv.logsumexp(dim=1)
    log_probs_n = logits_nv.gather(1, tokens_n[:, None])[:, 0] - norm_n
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_n = norm_n - ((logits_nv - norm_n[:, None]).exp() * logits_nv).sum(dim=1)
    return log_probs_n, entropy_n


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
