"""Generalized advantage estimation, whitening and batch statistics. Pure functions.

Tensors are (responses, tokens): one response per row, without its prompt and padded on the right. Masks are True on
response tokens. Values on padding are ignored.
"""

from __future__ import annotations

import torch


def generalized_advantages(
    rewards_bt: torch.Tensor, values_bt: torch.Tensor, mask_bt: torch.Tensor, gamma: float, gae_lambda: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return advantages by GAE (Schulman et al. 2015, https://arxiv.org/abs/1506.02438, eq. 16), and returns, which are
    the targets of the value model (advantage + value). Both are (responses, tokens), 0 outside the mask.

    rewards_bt: rewards of each token; values_bt: values of the states before each token. The value after the last token
    is 0, for truncated responses too, because the last token has the reward of the response.
    """
    values_bt = torch.where(mask_bt, values_bt, 0.0)
    rewards_bt = torch.where(mask_bt, rewards_bt, 0.0)
    advantages_bt = torch.zeros_like(values_bt)
    advantage_b = torch.zeros_like(values_bt[:, 0])
    next_value_b = torch.zeros_like(values_bt[:, 0])
    for time in reversed(range(values_bt.shape[1])):
        delta_b = rewards_bt[:, time] + gamma * next_value_b - values_bt[:, time]
        advantage_b = delta_b + gamma * gae_lambda * advantage_b
        advantages_bt[:, time] = advantage_b
        next_value_b = values_bt[:, time]
    return advantages_bt, advantages_bt + values_bt


def masked_mean(values_bt: torch.Tensor, mask_bt: torch.Tensor) -> torch.Tensor:
    """Return the mean over the mask, a scalar."""
    return torch.where(mask_bt, values_bt, 0.0).sum() / mask_bt.sum()


def whiten(values_bt: torch.Tensor, mask_bt: torch.Tensor, *, shift: bool = True) -> torch.Tensor:
    """Scale values to standard deviation 1 over the mask and, with `shift`, to mean 0. Return (responses, tokens), 0
    outside the mask.

    Pass the complete batch of all workers (rollouts.py), so that the statistics do not depend on the number of workers.
    """
    mean = masked_mean(values_bt, mask_bt)
    # Bessel's correction (n - 1), as in torch.var and TRL.
    variance = masked_mean((values_bt - mean) ** 2, mask_bt) * (mask_bt.sum() / (mask_bt.sum() - 1).clamp(min=1))
    whitened_bt = (values_bt - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask_bt, whitened_bt if shift else whitened_bt + mean, 0.0)


def explained_variance(values_bt: torch.Tensor, returns_bt: torch.Tensor, mask_bt: torch.Tensor) -> float:
    """Return 1 - Var(returns - values) / Var(returns) over the mask: 1 for perfect predictions, 0 for a constant
    prediction, and 0 if all returns are equal."""
    returns, residuals = returns_bt[mask_bt].double(), (returns_bt - values_bt)[mask_bt].double()
    variance = returns.var(correction=0)
    return float(1 - residuals.var(correction=0) / variance) if variance > 0 else 0.0
