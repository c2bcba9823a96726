"""64-bit hashes of word n-grams, in numpy: a text of n words takes some n numbers, not n strings of n-grams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from tunery.scoring.scorers.texts import LONGEST, terms

Hashes = NDArray[np.uint64]
Integers = NDArray[np.int64]

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's hash is lost by multiplying


@dataclass(frozen=True)
class Words:
    """The words of some texts (of each the first LONGEST characters), end to end; all arrays have an entry a word."""

    texts: int
    hashes: Hashes
    """Equal for equal words in every process."""
    text: Integers
    """Which text it is in."""
    size: Integers
    """Words of that text."""
    left: Integers
    """Words from this one on to that text's end."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Words:
        split = [terms(text[:LONGEST]) for text in texts]
        sizes = np.array([len(some) for some in split], dtype=np.int64)
        (hashes,) = RMinHash.hash_token_sets([[word for some in split for word in some]])
        size = np.repeat(sizes, sizes)
        left = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(size))
        return cls(len(split), np.array(hashes, dtype=np.uint64), np.repeat(np.arange(len(split)), sizes), size, left)

    def runs(self, longest: int) -> Iterator[tuple[int, Hashes]]:
        """For each length up to `longest`: a hash, at each word, of the run of so many words from it on: other for
        other runs, but not evenly spread. Where fewer are `left`, it means nothing."""
        rolled = np.zeros(len(self.hashes), dtype=np.uint64)
        for length in range(1, longest + 1):
            last = self.hashes[length - 1 :]
            rolled = rolled * _BASE
            rolled[: len(last)] += last
            yield length, rolled

    def starts(self, n: int) -> NDArray[np.bool_]:
        """Where n-grams start; a text of fewer than n words is one."""
        first_of_few: NDArray[np.bool_] = (self.size < n) & (self.left == self.size)
        return first_of_few | (self.left >= n)

    def ngrams(self, n: int) -> tuple[Hashes, Integers]:
        """Evenly spread hashes of all n-grams, in their order, and how many each text has."""
        found = np.zeros(len(self.hashes), dtype=np.uint64)
        for length, hashes in self.runs(n):
            found = np.where(self.size >= length, hashes, found)
        starts = self.starts(n)
        return mixed(found[starts]), np.bincount(self.text[starts], minlength=self.texts)


def mixed(values: Hashes) -> Hashes:
    """The finalizer of SplitMix64 (Steele et al. 2014): every bit of a value moves every bit of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
