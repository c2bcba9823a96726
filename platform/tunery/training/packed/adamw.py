"""AdamW of many trainings at once: a row of each tensor is one training's."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BETAS = (0.9, 0.999)
EPSILON = 1e-8
"""As in transformers' TrainingArguments."""
CLIP_EPSILON = 1e-6
"""DeepSpeed adds it to the norm that it clips by (runtime/zero/stage_1_and_2.py, 0.19.8)."""


@dataclass(frozen=True)
class Rates:
    """Of one step of each member, all (members,) float64 on the CPU."""

    learning_rate: torch.Tensor
    weight_decay: torch.Tensor
    max_norm: torch.Tensor
    step: torch.Tensor
    """Of this member, from 1."""


def update(
    weights_kn: torch.Tensor, grads_kn: torch.Tensor, first_kn: torch.Tensor, second_kn: torch.Tensor, rates: Rates
) -> torch.Tensor:
    """Clips each member's gradients to its own norm, then takes a step of AdamW (Loshchilov & Hutter 2017,
    https://arxiv.org/abs/1711.05101). All but `rates` are changed in place; returns the norms before clipping, (k,).

    Where the norm of a member's gradients is not finite, its weights and moments stay as they were: DeepSpeed skips
    such a step of a training alone, too.
    """
    norms_k: torch.Tensor = torch.linalg.vector_norm(grads_kn, dim=1)
    norms = norms_k.double().cpu()
    skipped = [index for index, finite in enumerate(torch.isfinite(norms).tolist()) if not finite]
    before = [whole_kn[skipped].clone() for whole_kn in (weights_kn, first_kn, second_kn)] if skipped else []

    def column(values_k: torch.Tensor) -> torch.Tensor:
        return values_k.to(weights_kn)[:, None]

    too_long_k = ((norms + CLIP_EPSILON) / rates.max_norm).clamp(min=1.0)
    grads_kn.div_(column(too_long_k))
    one, two = BETAS
    weights_kn.mul_(column(1 - rates.learning_rate * rates.weight_decay))
    first_kn.lerp_(grads_kn, 1 - one)
    second_kn.mul_(two).addcmul_(grads_kn, grads_kn, value=1 - two)
    spread_kn = second_kn.sqrt().div_(column((1 - two**rates.step).sqrt())).add_(EPSILON)
    weights_kn.sub_(first_kn.div(spread_kn).mul_(column(rates.learning_rate / (1 - one**rates.step))))
    for whole_kn, kept_kn in zip((weights_kn, first_kn, second_kn), before, strict=bool(skipped)):
        whole_kn[skipped] = kept_kn
    return norms_k
