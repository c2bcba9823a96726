"""The clipped losses of a token (Schulman et al. 2017, https://arxiv.org/abs/1707.06347, eq. 7), and the entropy. Pure.

A loss is that of each token, not yet averaged: whoever adds micro batches up divides by the tokens of the whole
minibatch, on all workers. TRL averages each micro batch by its own tokens instead, which weighs a token by how it was
batched; with one micro batch a minibatch and one worker the two are the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def log_probs_of(
    logits_nv: torch.Tensor, tokens_n: torch.Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each token and entropy of what it was drawn from (nats), both (tokens,) in float32.

    logits_nv: (tokens, vocabulary); tokens_n: (tokens,), int64. At the sampler's temperature. The sampler's cuts
    (top_p, min_new_tokens) are not repeated: the ratio of new to old probabilities is of the model's own distribution.
    The entropy has a gradient only where it is asked for.
    """
    logits_nv = logits_nv.float() / temperature
    norm_n = logits_nv.logsumexp(dim=1)
    log_probs_n = logits_nv.gather(1, tokens_n[:, None])[:, 0] - norm_n
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_n = norm_n - ((logits_nv - norm_n[:, None]).exp() * logits_nv).sum(dim=1)
    return log_probs_n, entropy_n


@dataclass(frozen=True)
class PolicyLoss:
    """Of each token, in the shape of the arguments."""

    loss: torch.Tensor
    clipped: torch.Tensor
    """1 where the clipped loss is the larger one, so that the token has no gradient."""
    approximate_kl: torch.Tensor
    """Of the old policy from the new: half the squared log-ratio (k2)."""


def policy_loss(log_probs: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor, clip: float) -> PolicyLoss:
    """All of one shape, a value a token; `old` are the log-probabilities under the policy that drew the answers."""
    log_ratio = log_probs - old
    ratio = log_ratio.exp()
    plain = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - clip, 1 + clip)
    return PolicyLoss(torch.maximum(plain, clipped), (clipped > plain).float(), 0.5 * log_ratio.detach() ** 2)


def value_loss(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float | None) -> torch.Tensor:
    """Half the squared error of each token's value; the larger one of that and the error of a value that has moved at
    most `clip` from its old one."""
    loss = (values - returns) ** 2
    if clip is not None:
        near = old + (values - old).clamp(-clip, clip)
        loss = torch.maximum(loss, (near - returns) ** 2)
    return 0.5 * loss
