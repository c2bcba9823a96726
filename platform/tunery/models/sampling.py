"""Drawing tokens from logits, so that what is drawn depends on the row alone: not on its batch, nor on its worker.

Each row brings its own uniform numbers, one a token, and a token is drawn by inverting the cumulative distribution. So
one worker with 16 rows and two with 8 draw the same, a resumed training draws what it would have drawn, and no state of
a random number generator has to be kept.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from tunery.spec import Sampling


def uniform_numbers(seed: int, name: str, keys: Sequence[tuple[int, ...]], count: int) -> torch.Tensor:
    """(rows, count) in [0, 1), float64 on the CPU: a row a key, from (seed, name, key) alone."""
    rows = []
    for key in keys:
        digest = hashlib.sha256(json.dumps([seed, name, *key]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.float64)


def sample(logits_bv: torch.Tensor, uniform_b: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """A token a row, (rows,) int64, and its log-probability under what it was drawn from, (rows,) float32.

    logits_bv: (rows, vocabulary) in any float dtype; uniform_b: (rows,) in [0, 1) on the same device. At
    temperature 0 the likeliest token, whose log-probability is 0.
    """
    logits_bv = logits_bv.float()
    if sampling.temperature == 0:
        tokens_b = logits_bv.argmax(dim=1)
        return tokens_b, torch.zeros_like(tokens_b, dtype=torch.float32)
    log_probs_bv = torch.log_softmax(logits_bv / sampling.temperature, dim=1)
    if sampling.top_p < 1:
        log_probs_bv = torch.log_softmax(top_p_filter(log_probs_bv, sampling.top_p), dim=1)
    cumulative_bv = log_probs_bv.exp().cumsum(dim=1, dtype=torch.float64)
    # Scaled by the last sum, which rounding leaves near 1 but not at it.
    target_b1 = uniform_b[:, None].to(cumulative_bv) * cumulative_bv[:, -1:]
    tokens_b = torch.searchsorted(cumulative_bv, target_b1, right=True)[:, 0].clamp(max=logits_bv.shape[1] - 1)
    return tokens_b, log_probs_bv.gather(1, tokens_b[:, None])[:, 0]


def top_p_filter(log_probs_bv: torch.Tensor, top_p: float) -> torch.Tensor:
    """-inf for all but the likeliest tokens that together reach `top_p`; the likeliest one always stays
    (Holtzman et al. 2019, https://arxiv.org/abs/1904.09751)."""
    ordered_bv, index_bv = log_probs_bv.sort(dim=1, descending=True)
    probs_bv = ordered_bv.exp()
    beyond_bv = probs_bv.cumsum(dim=1) - probs_bv >= top_p
    return log_probs_bv.masked_fill(beyond_bv.scatter(1, index_bv, beyond_bv), -torch.inf)
