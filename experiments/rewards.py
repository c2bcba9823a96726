"""Rewards with a known response, for grpo.yaml, rloo.yaml and win_rate.yaml."""

from __future__ import annotations

import re
from collections.abc import Sequence

MAX_COUNT = 5


def count_the(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return how often the word "the" occurs in each response, at most 5: the optimum is known."""
    return [float(min(MAX_COUNT, len(re.findall(r"\bthe\b", response, re.IGNORECASE)))) for response in responses]


def is_uncorrupted(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return the share of three-word sequences that occur for the first time, plus 1 if the last sentence ends.

    Repeated and cut responses score low. It can't see shuffled words or the response to another question.
    """
    rewards = []
    for response in responses:
        words = response.split()
        triples = list(zip(words, words[1:], words[2:], strict=False))
        fresh = len(set(triples)) / len(triples) if triples else 0.0
        rewards.append(fresh + response.rstrip().endswith((".", "!", "?")))
    return rewards
