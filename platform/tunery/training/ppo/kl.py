"""Per-token KL estimates, KL-penalised token rewards and the adaptive KL coefficient. Pure functions."""

from __future__ import annotations

import math
from typing import Literal

import torch


def kl_per_token(
    log_probs_bt: torch.Tensor, reference_bt: torch.Tensor, estimator: Literal["k1", "k3"]
) -> torch.Tensor:
    """Per-token estimate of KL(policy || reference), from one sampled token each (http://joschu.net/blog/kl-approx.html).

    Both (rows, tokens), the log-probability of the sampled token under either model. With r = q / p: k1 is -log r,
    k3 is (r - 1) - log r; both are unbiased, k3 is never negative.
    """
    log_ratio_bt = reference_bt - log_probs_bt
    return -log_ratio_bt if estimator == "k1" else log_ratio_bt.exp() - 1 - log_ratio_bt


def token_rewards(
    scores_b: torch.Tensor, kl_bt: torch.Tensor, mask_bt: torch.Tensor, coefficient: float, *, late: bool = False
) -> torch.Tensor:
    """Per-token rewards, (rows, tokens): the KL penalty on every response token plus the score on the last one.

    mask_bt is True on the response tokens, which come first in a row. `late` puts the score one position later, as TRL
    does (1.12, trl.experimental.ppo; on the last token if a row is full): TRL evaluates the value model once more after
    the EOS token, and that value enters the advantages. Here the episode ends with its last token.
    """
    rewards_bt = torch.where(mask_bt, -coefficient * kl_bt, 0.0)
    last_b = mask_bt.sum(dim=1) - 1
    if late:
        last_b = (last_b + 1).clamp(max=mask_bt.shape[1] - 1)
    return rewards_bt.scatter_add(1, last_b[:, None], scores_b[:, None].to(rewards_bt))


def apply_eos_penalty(scores_b: torch.Tensor, ended_b: torch.Tensor, missing_eos_penalty: float) -> torch.Tensor:
    """Subtract `missing_eos_penalty` from the scores of responses without an EOS token."""
    return torch.where(ended_b, scores_b, scores_b - missing_eos_penalty)


def adapt_kl_coef(coefficient: float, kl: float, target: float, horizon: float, num_responses: int) -> float:
    """Return the KL coefficient after a batch of `num_responses` responses with mean KL `kl` (nats per response).

    A proportional controller in log space, with its error clipped to +-0.2 (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, section 2.2).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * math.exp(error * num_responses / horizon)
