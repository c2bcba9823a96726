"""Negative log-likelihood by a head that nobody trains, and its gradient worked out along with it.

Autograd would keep the logits, the largest tensor of a small model, until the backward pass, or make them again there.
A token's loss depends on its own hidden state alone: its gradient is known as soon as its logits are, a piece of the
tokens at a time. Two products by the head instead of three, and no logits in memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import linear

PIECE_BYTES = {"cpu": 1 << 21, "cuda": 1 << 28}
"""Of logits at a time, float32. On a CPU they stay in its caches."""


def fused_nll(hidden_nh: torch.Tensor, head: torch.nn.Module, targets_n: torch.Tensor) -> torch.Tensor:
    """-log p in nats of each target, (n,) float32. `head`: a linear layer, with a bias or without."""
    bias: torch.Tensor | None = getattr(head, "bias", None)
    nll_n: torch.Tensor = _Nll.apply(hidden_nh, head.weight, bias, targets_n)  # type: ignore[no-untyped-call]
    return nll_n


class _Nll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_nh: torch.Tensor, weight_vh: torch.Tensor, bias_v: torch.Tensor | None, targets_n: torch.Tensor
    ) -> torch.Tensor:
        learns: bool = ctx.needs_input_grad[0]
        nll_n = torch.empty(len(targets_n), device=hidden_nh.device)
        grads_nh = torch.empty_like(hidden_nh if learns else hidden_nh[:0])
        piece = max(1, PIECE_BYTES[hidden_nh.device.type] // (4 * len(weight_vh)))
        for start in range(0, len(targets_n), piece):
            part = slice(start, start + piece)
            logits_mv = linear(hidden_nh[part], weight_vh, bias_v).float()
            logits_mv.sub_(logits_mv.amax(1, keepdim=True))
            targets_m1 = targets_n[part, None]
            target_m = logits_mv.gather(1, targets_m1)[:, 0]
            shares_mv = logits_mv.exp_()
            sums_m = shares_mv.sum(1)
            nll_n[part] = sums_m.log() - target_m
            if learns:
                # d nll / d logits: softmax minus one-hot.
                shares_mv.div_(sums_m[:, None]).scatter_add_(1, targets_m1, torch.full_like(sums_m, -1.0)[:, None])
                grads_nh[part] = shares_mv.to(weight_vh.dtype) @ weight_vh
        ctx.save_for_backward(grads_nh)
        return nll_n

    @staticmethod
    def backward(ctx: Any, grad_n: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (grads_nh,) = ctx.saved_tensors
        return (grads_nh * grad_n[:, None]).to(grads_nh.dtype), None, None, None
