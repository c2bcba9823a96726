"""Advantages and returns from token rewards and values, and the statistics over a batch. Pure.

Answers are rows of (rows, tokens), their tokens first; a mask is True on them. Prompts are not in these tensors, so
neither they nor padding ever count.
"""

from __future__ import annotations

import torch


def generalized_advantages(
    rewards_bt: torch.Tensor, values_bt: torch.Tensor, mask_bt: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalized advantage estimation (Schulman et al. 2015, https://arxiv.org/abs/1506.02438, eq. 16), and the
    returns that the value model learns (advantage + value). Both (rows, tokens), 0 off the mask.

    values_bt: of the state before each token is drawn. After an answer's last token comes nothing: also one that was
    cut off is taken to have ended there, as its reward is given there.
    """
    values_bt = torch.where(mask_bt, values_bt, 0.0)
    rewards_bt = torch.where(mask_bt, rewards_bt, 0.0)
    advantages_bt = torch.zeros_like(values_bt)
    advantage_b = torch.zeros_like(values_bt[:, 0])
    after_b = torch.zeros_like(values_bt[:, 0])
    for time in reversed(range(values_bt.shape[1])):
        delta_b = rewards_bt[:, time] + gamma * after_b - values_bt[:, time]
        advantage_b = delta_b + gamma * lam * advantage_b
        advantages_bt[:, time] = advantage_b
        after_b = values_bt[:, time]
    return advantages_bt, advantages_bt + values_bt


def masked_mean(values_bt: torch.Tensor, mask_bt: torch.Tensor) -> torch.Tensor:
    """Over the mask; a scalar."""
    return torch.where(mask_bt, values_bt, 0.0).sum() / mask_bt.sum()


def whiten(values_bt: torch.Tensor, mask_bt: torch.Tensor, *, shift: bool = True) -> torch.Tensor:
    """To deviation 1 over the mask, and, with `shift`, to mean 0; 0 off the mask.

    The batch is that of all workers: each holds all of it (rollouts.py), so that no worker whitens by its own share.
    """
    mean = masked_mean(values_bt, mask_bt)
    # Divided by n - 1, as torch.var does and TRL with it.
    variance = masked_mean((values_bt - mean) ** 2, mask_bt) * (mask_bt.sum() / (mask_bt.sum() - 1).clamp(min=1))
    white_bt = (values_bt - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask_bt, white_bt if shift else white_bt + mean, 0.0)


def explained_variance(values_bt: torch.Tensor, returns_bt: torch.Tensor, mask_bt: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns): 1 where the value model foretells all, 0 where it is no better than a
    constant. 0 where all returns are the same."""
    returns, missed = returns_bt[mask_bt].double(), (returns_bt - values_bt)[mask_bt].double()
    spread = returns.var(correction=0)
    return float(1 - missed.var(correction=0) / spread) if spread > 0 else 0.0
