"""Preference pairs as two token sequences each, for `dpo` and `reward`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunery.models.tokenized_dataset import Integers, TokenStats
from tunery.training.sequences import SequenceSet


@dataclass(frozen=True)
class PairSet:
    """Preference pairs. Pair i consists of sequence 2i with the chosen response and sequence 2i + 1 with the rejected
    one."""

    sequences: SequenceSet

    def __len__(self) -> int:
        return len(self.sequences) // 2

    @property
    def lengths(self) -> Integers:
        """(pairs,) int64, number of tokens of both sequences."""
        lengths: Integers = self.sequences.lengths.reshape(-1, 2).sum(axis=1)
        return lengths

    @property
    def part_sizes(self) -> list[int]:
        """Number of pairs of each data stage."""
        return [size // 2 for size in self.sequences.part_sizes]

    @property
    def part_stats(self) -> list[TokenStats]:
        return self.sequences.part_stats

    def sequence_indices(self, pairs: Sequence[int]) -> list[int]:
        """Return the indices of the chosen sequences of `pairs`, followed by those of the rejected ones."""
        return [*(2 * pair for pair in pairs), *(2 * pair + 1 for pair in pairs)]
