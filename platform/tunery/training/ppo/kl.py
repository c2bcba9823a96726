"""KL divergence from sampled tokens, as a penalty in their rewards, and the control of its coefficient. Pure."""

from __future__ import annotations

import math
from typing import Literal

import torch


def kl_per_token(
    log_probs_bt: torch.Tensor, reference_bt: torch.Tensor, estimator: Literal["k1", "k3"]
) -> torch.Tensor:
    """Estimates of KL(policy || reference) from one sampled token each (http://joschu.net/blog/kl-approx.html).

    Both (rows, tokens), the log-probability of the sampled token under either model. With r = q / p: k1 is -log r,
    k3 is (r - 1) - log r; both are unbiased, k3 is never negative.
    """
    log_ratio_bt = reference_bt - log_probs_bt
    return -log_ratio_bt if estimator == "k1" else log_ratio_bt.exp() - 1 - log_ratio_bt


def token_rewards(
    scores_b: torch.Tensor, kl_bt: torch.Tensor, mask_bt: torch.Tensor, coefficient: float, *, late: bool = False
) -> torch.Tensor:
    """(rows, tokens): the KL penalty on every token of an answer, and the answer's score on its last one.

    mask_bt is True on the answer's tokens, which come first in a row. `late` puts the score one place further, where
    TRL has it (1.12, trl.experimental.ppo; on the last token where a row is full): there the value model is asked once
    more, after the end token, and its answer enters the advantages. Here the episode ends with its last token.
    """
    rewards_bt = torch.where(mask_bt, -coefficient * kl_bt, 0.0)
    last_b = mask_bt.sum(dim=1) - 1
    if late:
        last_b = (last_b + 1).clamp(max=mask_bt.shape[1] - 1)
    return rewards_bt.scatter_add(1, last_b[:, None], scores_b[:, None].to(rewards_bt))


def apply_eos_penalty(scores_b: torch.Tensor, ended_b: torch.Tensor, missing_eos_penalty: float) -> torch.Tensor:
    """Scores of answers, less for those that were cut off."""
    return torch.where(ended_b, scores_b, scores_b - missing_eos_penalty)


def adapt_kl_coef(coefficient: float, kl: float, target: float, horizon: float, answers: int) -> float:
    """The coefficient after a batch of so many answers with this KL (nats an answer), moved towards the target.

    A proportional controller in log space, its error cut at 0.2 (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, section 2.2).
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * math.exp(error * answers / horizon)
