"""What ends a PPO training with an error rather than with a spoilt model, beside divergence
(training/divergence.py)."""

from __future__ import annotations

from tunery.errors import StageError

MIN_REWARD_SAMPLES = 512
"""Answers among which rewards have to differ, from the beginning: of a reward that one answer in a hundred gets, so
many are alike with a chance of 0.6%."""


def check_kl(stage: str, step: int, kl: float, bound: float) -> None:
    """kl: nats an answer, of the policy from the reference."""
    if kl > bound:
        raise StageError(
            stage,
            f"KL to the reference is {kl:.1f} nats an answer at step {step}, beyond the bound of {bound:g}",
            cause="the policy has left what the reward model was trained on: its rewards mean little there",
            remedy="raise `kl.coefficient`, set `kl.target`, lower `learning_rate`, or raise `kl.max_kl` on purpose",
        )


def check_rewards_differ(stage: str, least: float, most: float, answers: int, last: bool) -> None:
    """least, most: rewards of all answers so far. Raises StageError where they are the same after many answers, or at
    the training's last step."""
    if least == most and (answers >= MIN_REWARD_SAMPLES or last):
        raise StageError(
            stage,
            f"all {answers:,} answers so far got the same reward, {least:g}",
            cause="from answers that are all worth the same nothing can be learned",
            remedy="look at the reward: does it see the answers, and can they reach what it asks for?",
        )
