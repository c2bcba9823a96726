"""AdamW for all members of a pack at once: each row of a tensor belongs to one member."""

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
    """Hyperparameters of one step, each (members,) float64 on the CPU."""

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
    """Clip the gradients of each member to its own `max_norm`, then take an AdamW step (Loshchilov & Hutter 2017,
    https://arxiv.org/abs/1711.05101). Return the gradient norms before clipping, (members,).

    All tensors are (members, parameters) float32 and updated in place. If the gradient norm of a member is not finite,
    its weights and moments stay unchanged, as DeepSpeed skips such a step.
    """
    norms_k: torch.Tensor = torch.linalg.vector_norm(grads_kn, dim=1)
    norms = norms_k.double().cpu()
    skipped = [index for index, is_finite in enumerate(torch.isfinite(norms).tolist()) if not is_finite]
    states = (weights_kn, exp_avg_kn, exp_avg_sq_kn)
    skipped_states = [state_kn[skipped].clone() for state_kn in states] if skipped else []

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
    if skipped:
        for state_kn, skipped_state_kn in zip(states, skipped_states, strict=True):
            state_kn[skipped] = skipped_state_kn
    return norms_k
