"""Checks that end a PPO training with an error: too large KL, or constant rewards. divergence.py checks the losses."""

from __future__ import annotations

from tunery.errors import StageError

MIN_REWARD_SAMPLES = 512
"""Number of responses among which at least two rewards must differ. If 1% of the responses get a different reward, this
many are all equal with a probability of 0.6%."""


def check_kl(stage: str, step: int, kl: float, max_kl: float) -> None:
    """Raise StageError if the mean KL to the reference, in nats per response, exceeds `max_kl`."""
    if kl > max_kl:
        raise StageError(
            stage,
            f"KL to the reference is {kl:.1f} nats per response at step {step}, above max_kl = {max_kl:g}",
            cause="the policy is far from the data that the reward model was trained on, so its rewards are unreliable",
            remedy="raise `kl.coefficient`, set `kl.target`, lower `learning_rate`, or raise `kl.max_kl`",
        )


def check_rewards_differ(
    stage: str, reward_min: float, reward_max: float, num_responses: int, is_last_step: bool
) -> None:
    """Raise StageError if all rewards so far are equal, after MIN_REWARD_SAMPLES responses or at the last step."""
    if reward_min == reward_max and (num_responses >= MIN_REWARD_SAMPLES or is_last_step):
        raise StageError(
            stage,
            f"all {num_responses:,} responses so far got the same reward, {reward_min:g}",
            cause="with constant rewards all advantages are zero, so there is nothing to learn",
            remedy="check the reward: does it depend on the response, and can the policy's responses change it?",
        )
