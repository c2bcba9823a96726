"""What ends a PPO training with an error rather than with a spoilt model."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tunery.errors import StageError

PATIENCE = 3
"""Batches of answers in which rewards have to differ at least once, from the beginning."""


def check_finite(stage: str, step: int, **values: float) -> None:
    """Raises StageError that names the first value that is no number."""
    for name, value in values.items():
        if not math.isfinite(value):
            raise StageError(
                stage,
                f"{name.replace('_', ' ')} is {value} at step {step}",
                cause="the training has diverged, or the reward is no number",
                remedy="lower `learning_rate` or `ppo_epochs`; compute.precision: fp32 tells whether it is rounding",
            )


def check_kl(stage: str, step: int, kl: float, bound: float) -> None:
    """kl: nats an answer, of the policy from the reference."""
    if kl > bound:
        raise StageError(
            stage,
            f"KL to the reference is {kl:.1f} nats an answer at step {step}, beyond the bound of {bound:g}",
            cause="the policy has left what the reward model was trained on: its rewards mean little there",
            remedy="raise `kl.coefficient`, set `kl.target`, lower `learning_rate`, or raise `kl.bound` on purpose",
        )


def check_rewards_differ(stage: str, scores: Sequence[float], step: int, varied: bool) -> bool:
    """`varied`: whether rewards differed in an earlier batch. Returns whether they have by now; raises StageError when
    they never did in the first batches."""
    varied = varied or max(scores) > min(scores)
    if not varied and step >= PATIENCE:
        raise StageError(
            stage,
            f"in each of the first {step} batches all answers got the same reward, now {scores[0]:g}",
            cause="from answers that are all worth the same nothing can be learned",
            remedy="look at the reward: does it see the answers, and can they reach what it asks for?",
        )
    return varied
