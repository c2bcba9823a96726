"""Preference pairs of a training, as two token sequences each: `dpo` and `reward` learn from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunery.models.tokenized_dataset import Integers, TokenStats
from tunery.training.sequences import SequenceSet


@dataclass(frozen=True)
class PairSet:
    """Preference pairs: sequence 2i is the chosen one of pair i, sequence 2i + 1 the rejected one."""

    sequences: SequenceSet

    def __len__(self) -> int:
        return len(self.sequences) // 2

    @property
    def lengths(self) -> Integers:
        """(pairs,) tokens of both sequences."""
        lengths: Integers = self.sequences.lengths.reshape(-1, 2).sum(axis=1)
        return lengths

    @property
    def part_sizes(self) -> list[int]:
        """Pairs of each data stage."""
        return [size // 2 for size in self.sequences.part_sizes]

    @property
    def part_stats(self) -> list[TokenStats]:
        return self.sequences.part_stats

    def sequence_indices(self, pairs: Sequence[int]) -> list[int]:
        """Indices of the chosen sequences of `pairs`, followed by those of the rejected ones."""
        return [*(2 * pair for pair in pairs), *(2 * pair + 1 for pair in pairs)]
