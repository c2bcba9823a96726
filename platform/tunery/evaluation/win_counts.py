"""How often the answers of one model beat those of another, and how sure that is. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

Z = 1.96
"""Of a normal distribution, 95% lies within so many standard deviations."""


@dataclass(frozen=True)
class WinCounts:
    wins: int
    ties: int
    losses: int

    @property
    def rate(self) -> float:
        """A tie counts half. NaN where nothing was compared."""
        rows = self.wins + self.ties + self.losses
        return (self.wins + self.ties / 2) / rows if rows else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        return wilson(self.rate, self.wins + self.ties + self.losses)


def compare(pairs: Iterable[tuple[float, float, bool]]) -> WinCounts:
    """`pairs`: reward of the model's answer, of the baseline's, and whether both answers are the same text. That is a
    tie whatever the rewards: a judge gives the same text other numbers in another batch, by rounding."""
    wins = ties = losses = 0
    for mine, theirs, same in pairs:
        if same or mine == theirs:
            ties += 1
        elif mine > theirs:
            wins += 1
        else:
            losses += 1
    return WinCounts(wins, ties, losses)


def wilson(share: float, rows: int) -> tuple[float, float]:
    """95% interval of a share of independent rows, by a normal approximation that also holds near 0 and 1, where the
    usual one has no width (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953).

    It takes the variance of a row to be p(1 - p). Ties that count half have less, so with ties it is too wide rather
    than too narrow. It knows of the prompts that were drawn, not of another judge or of another training. The whole
    range where there are no rows.
    """
    if not rows:
        return 0.0, 1.0
    square = Z * Z / rows
    middle = (share + square / 2) / (1 + square)
    half = Z / (1 + square) * math.sqrt(share * (1 - share) / rows + square / (4 * rows))
    return max(0.0, middle - half), min(1.0, middle + half)
