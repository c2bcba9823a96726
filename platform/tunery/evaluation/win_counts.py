"""Win rate of one model against another, with a confidence interval. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Z = 1.96
"""95% of a normal distribution is within this many standard deviations."""


@dataclass(frozen=True)
class WinCounts:
    """Outcomes of the comparisons of a model with the baseline, one per prompt."""

    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        """Win rate, where ties count half; NaN without comparisons."""
        rows = self.wins + self.ties + self.losses
        return (self.wins + self.ties / 2) / rows if rows else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """95% confidence interval of the win rate."""
        return wilson_interval(self.rate, self.wins + self.ties + self.losses)


def compare(pairs: Iterable[tuple[float, float, bool]]) -> WinCounts:
    """Count the outcomes. `pairs`: (reward of the model's response, reward of the baseline's response, whether both
    responses are equal).

    Equal responses are a tie whatever their rewards: by rounding, the judge's rewards of the same text differ between
    batches.
    """
    wins = ties = losses = 0
    for reward, baseline_reward, is_equal in pairs:
        if is_equal or reward == baseline_reward:
            ties += 1
        elif reward > baseline_reward:
            wins += 1
        else:
            losses += 1
    return WinCounts(wins, ties, losses)


def wilson_interval(rate: float, rows: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a rate over independent rows; (0, 1) without rows (Wilson 1927,
    https://doi.org/10.1080/01621459.1927.10502953).

    Unlike the normal (Wald) interval, its width is not 0 at rates of 0 and 1. It assumes a variance of p(1 - p) per
    row. Ties that count half have less variance, so with ties the interval is conservative. It covers the sampling of
    prompts, not the choice of the judge or the variance between trainings.
    """
    if not rows:
        return 0.0, 1.0
    z2_over_n = Z * Z / rows
    center = (rate + z2_over_n / 2) / (1 + z2_over_n)
    half_width = Z / (1 + z2_over_n) * math.sqrt(rate * (1 - rate) / rows + z2_over_n / (4 * rows))
    return max(0.0, center - half_width), min(1.0, center + half_width)
