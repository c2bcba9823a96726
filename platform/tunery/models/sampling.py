"""Sample tokens from logits reproducibly: the result depends only on the row, not on its batch or worker.

Each row has its own uniform random numbers, one per token, and tokens are sampled by inverting the cumulative
distribution. One worker with 16 rows samples the same tokens as two workers with 8 rows each, or as a resumed training,
and checkpoints need no state of a random number generator.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

import torch

from tunery.spec import Sampling


def uniform_numbers(seed: int, name: str, keys: Sequence[tuple[int, ...]], count: int) -> torch.Tensor:
    """Return uniform random numbers in [0, 1), (keys, count) float64 on the CPU. Those of a key depend only on (seed,
    name, key)."""
    rows = []
    for key in keys:
        digest = hashlib.sha256(json.dumps([seed, name, *key]).encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand(count, generator=generator, dtype=torch.float64))
    return torch.stack(rows) if rows else torch.empty(0, count, dtype=torch.float64)


def sample(logits_bv: torch.Tensor, uniform_b: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample one token per row; return the tokens, (rows,) int64, and their log-probabilities, (rows,) float32.

    logits_bv: (rows, vocabulary) in any float dtype; uniform_b: (rows,) in [0, 1) on the same device. The
    log-probability is that of the distribution after temperature and top_p. At temperature 0 the most likely token is
    returned, with log-probability 0.
    """
    logits_bv = logits_bv.float()
    if sampling.temperature == 0:
        tokens_b = logits_bv.argmax(dim=1)
        return tokens_b, torch.zeros_like(tokens_b, dtype=torch.float32)
    log_probs_bv = torch.log_softmax(logits_bv / sampling.temperature, dim=1)
    if sampling.top_p < 1:
        log_probs_bv = torch.log_softmax(top_p_filter(log_probs_bv, sampling.top_p), dim=1)
    cumulative_bv = log_probs_bv.exp().cumsum(dim=1, dtype=torch.float64)
    # Scale by the last sum, which is not exactly 1 because of rounding.
    target_b1 = uniform_b[:, None].to(cumulative_bv) * cumulative_bv[:, -1:]
    tokens_b = torch.searchsorted(cumulative_bv, target_b1, right=True)[:, 0].clamp(max=logits_bv.shape[1] - 1)
    return tokens_b, log_probs_bv.gather(1, tokens_b[:, None])[:, 0]


def top_p_filter(log_probs_bv: torch.Tensor, top_p: float) -> torch.Tensor:
    """Set the log-probabilities, (rows, vocabulary), of all but the most likely tokens that together reach `top_p` to
    -inf. The most likely token is always kept (nucleus sampling, Holtzman et al. 2019,
    https://arxiv.org/abs/1904.09751)."""
    sorted_bv, index_bv = log_probs_bv.sort(dim=1, descending=True)
    probs_bv = sorted_bv.exp()
    removed_bv = probs_bv.cumsum(dim=1) - probs_bv >= top_p
    return log_probs_bv.masked_fill(removed_bv.scatter(1, index_bv, removed_bv), -torch.inf)
