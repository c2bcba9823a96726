"""Per-token KL estimates, KL-penalised token rewards and the adaptive KL coefficient. Pure functions."""

from __future__ import annotations

import math
from typing import Literal

import torch


def kl_per_token(
    log_probs_bt: torch.Tensor, reference_bt: torch.Tensor, estimator: Literal["k1", "k3"]
) -> torch.Tensor:
    """Return an estimate of KL(policy || reference) at each token in nats, (responses, tokens), from the one token that
    was sampled there (http://joschu.net/blog/kl-approx.html).

    log_probs_bt, reference_bt: log-probability of the sampled token under the policy and the reference. With r =
    reference probability / policy probability, k1 is -log r and k3 is (r - 1) - log r. Both are unbiased; k3 is never
    negative.
    """
    log_ratio_bt = reference_bt - log_probs_bt
    return -log_ratio_bt if estimator == "k1" else log_ratio_bt.exp() - 1 - log_ratio_bt


def token_rewards(
    scores_b: torch.Tensor, kl_bt: torch.Tensor, mask_bt: torch.Tensor, coefficient: float
) -> torch.Tensor:
    """Return the rewards of each token, (responses, tokens): -coefficient x KL on every response token, plus the score
    of the response on its last token.

    mask_bt is True on the response tokens, which come first in a row. The episode ends with the last token of the
    response. TRL (1.12, trl.experimental.ppo) puts the score one position later instead: it evaluates the value model
    once more after the EOS token, and that value enters the advantages.
    """
    rewards_bt = torch.where(mask_bt, -coefficient * kl_bt, 0.0)
    last_b = mask_bt.sum(dim=1) - 1
    return rewards_bt.scatter_add(1, last_b[:, None], scores_b[:, None].to(rewards_bt))


def apply_eos_penalty(scores_b: torch.Tensor, ended_b: torch.Tensor, missing_eos_penalty: float) -> torch.Tensor:
    """Return the scores, (responses,), with `missing_eos_penalty` subtracted from those of responses without an EOS
    token. ended_b: (responses,) bool."""
    return torch.where(ended_b, scores_b, scores_b - missing_eos_penalty)


def adapt_kl_coef(coefficient: float, kl: float, target: float, horizon: float, num_responses: int) -> float:
    """Return the KL coefficient after a batch of `num_responses` responses with the mean KL `kl`, in nats per response.

    A proportional controller in log space, whose error is clipped to +-0.2 (Ziegler et al. 2019,
    https://arxiv.org/abs/1909.08593, section 2.2). target: in nats per response; horizon: in responses.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coefficient * math.exp(error * num_responses / horizon)
