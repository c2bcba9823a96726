"""AdamW for several trainings at once: each row of a tensor belongs to one training."""

from __future__ import annotations

from dataclasses import dataclass

import torch

BETAS = (0.9, 0.999)
EPSILON = 1e-8
"""Both are the defaults of transformers' TrainingArguments."""
CLIP_EPSILON = 1e-6
"""DeepSpeed adds this to the gradient norm when it clips (runtime/zero/stage_1_and_2.py, 0.19.8)."""


@dataclass(frozen=True)
class StepHyperparams:
    """Hyperparameters of one step of each member, all (members,) float64 on the CPU."""

    learning_rate: torch.Tensor
    weight_decay: torch.Tensor
    max_norm: torch.Tensor
    step: torch.Tensor
    """Step number of each member, from 1."""


def update(
    weights_kn: torch.Tensor,
    grads_kn: torch.Tensor,
    exp_avg_kn: torch.Tensor,
    exp_avg_sq_kn: torch.Tensor,
    hyperparams: StepHyperparams,
) -> torch.Tensor:
    """Clip each member's gradients to its own `max_norm`, then take an AdamW step (Loshchilov & Hutter 2017,
    https://arxiv.org/abs/1711.05101). All tensors are (members, numbers) and updated in place. Returns the gradient
    norms before clipping, (members,).

    If a member's gradient norm is not finite, its weights and moments stay unchanged, as DeepSpeed skips such a step.
    """
    norms_k: torch.Tensor = torch.linalg.vector_norm(grads_kn, dim=1)
    norms = norms_k.double().cpu()
    skipped = [index for index, finite in enumerate(torch.isfinite(norms).tolist()) if not finite]
    before = [state_kn[skipped].clone() for state_kn in (weights_kn, exp_avg_kn, exp_avg_sq_kn)] if skipped else []

    def column(values_k: torch.Tensor) -> torch.Tensor:
        return values_k.to(weights_kn)[:, None]

    clip_divisor_k = ((norms + CLIP_EPSILON) / hyperparams.max_norm).clamp(min=1.0)
    grads_kn.div_(column(clip_divisor_k))
    beta1, beta2 = BETAS
    weights_kn.mul_(column(1 - hyperparams.learning_rate * hyperparams.weight_decay))
    exp_avg_kn.lerp_(grads_kn, 1 - beta1)
    exp_avg_sq_kn.mul_(beta2).addcmul_(grads_kn, grads_kn, value=1 - beta2)
    denominator_kn = exp_avg_sq_kn.sqrt().div_(column((1 - beta2**hyperparams.step).sqrt())).add_(EPSILON)
    weights_kn.sub_(
        exp_avg_kn.div(denominator_kn).mul_(column(hyperparams.learning_rate / (1 - beta1**hyperparams.step)))
    )
    for state_kn, before_kn in zip((weights_kn, exp_avg_kn, exp_avg_sq_kn), before, strict=bool(skipped)):
        state_kn[skipped] = before_kn
    return norms_k
