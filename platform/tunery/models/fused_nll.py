"""Negative log-likelihood by a frozen head, with the gradient computed in the forward pass.

Autograd would keep the logits, the largest tensor of a small model, until the backward pass, or recompute them there. A
token's loss depends only on its own hidden state, so loss and gradient are computed together, in chunks of tokens. This
takes two matrix products with the head instead of three, and never holds all logits in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

CHUNK_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Bytes of float32 logits per chunk. Small on a CPU, so that they stay in its caches."""


def fused_nll(hidden_nh: torch.Tensor, head: torch.nn.Module, targets_n: torch.Tensor) -> torch.Tensor:
    """Return -log p of each target in nats, (n,) float32. `head`: a frozen linear layer, with or without bias."""
    bias: torch.Tensor | None = getattr(head, "bias", None)
    nll_n: torch.Tensor = _Nll.apply(hidden_nh, head.weight, bias, targets_n)  # type: ignore[no-untyped-call]
    return nll_n


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_nh: torch.Tensor, weight_vh: torch.Tensor, bias_v: torch.Tensor | None, targets_n: torch.Tensor
    ) -> torch.Tensor:
        needs_grad: bool = ctx.needs_input_grad[0]
        nll_n = torch.empty(len(targets_n), device=hidden_nh.device)
        grads_nh = torch.empty_like(hidden_nh if needs_grad else hidden_nh[:0])
        chunk_size = max(1, CHUNK_BYTES[hidden_nh.device.type] // (4 * len(weight_vh)))
        for start in range(0, len(targets_n), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits_mv = linear(hidden_nh[chunk], weight_vh, bias_v).float()
            logits_mv.sub_(logits_mv.amax(1, keepdim=True))
            targets_m1 = targets_n[chunk, None]
            target_m = logits_mv.gather(1, targets_m1)[:, 0]
            probs_mv = logits_mv.exp_()
            sums_m = probs_mv.sum(1)
            nll_n[chunk] = sums_m.log() - target_m
            if needs_grad:
                # d nll / d logits: softmax minus one-hot.
                probs_mv.div_(sums_m[:, None]).scatter_add_(1, targets_m1, torch.full_like(sums_m, -1.0)[:, None])
                grads_nh[chunk] = probs_mv.to(weight_vh.dtype) @ weight_vh
        ctx.save_for_backward(grads_nh)
        return nll_n

    @staticmethod
    def backward(ctx: Any, grad_n: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grads_nh,) = ctx.saved_tensors
        return (grads_nh * grad_n[:, None]).to(grads_nh.dtype), None, None, None
