"""64-bit hashes of word n-grams in numpy arrays, without n-gram strings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from tunery.scoring.scorers.texts import MAX_CHARS, terms

Hashes = NDArray[np.uint64]
Integers = NDArray[np.int64]

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplication is invertible


@dataclass(frozen=True)
class Words:
    """The words of several texts (the first MAX_CHARS characters of each), concatenated. Arrays have one entry per
    word."""

    texts: int
    hashes: Hashes
    """Hash of the word, the same in every process."""
    text: Integers
    """Index of the text."""
    size: Integers
    """Number of words of the text."""
    left: Integers
    """Number of words from this one to the end of the text."""

    @classmethod
    def of(cls, texts: Sequence[str]) -> Words:
        split = [terms(text[:MAX_CHARS]) for text in texts]
        sizes = np.array([len(words) for words in split], dtype=np.int64)
        (hashes,) = RMinHash.hash_token_sets([[word for words in split for word in words]])
        size = np.repeat(sizes, sizes)
        left = np.repeat(np.cumsum(sizes), sizes) - np.arange(len(size))
        return cls(len(split), np.array(hashes, dtype=np.uint64), np.repeat(np.arange(len(split)), sizes), size, left)

    def runs(self, max_length: int) -> Iterator[tuple[int, Hashes]]:
        """Yield for each length up to `max_length` the polynomial hashes of the word sequences of that length.

        The hash at a word is that of the sequence starting there, and is undefined if fewer words are `left`. Hashes
        are not uniformly distributed (see `mixed`).
        """
        hashes = np.zeros(len(self.hashes), dtype=np.uint64)
        for length in range(1, max_length + 1):
            last_words = self.hashes[length - 1 :]
            hashes = hashes * _BASE
            hashes[: len(last_words)] += last_words
            yield length, hashes

    def starts(self, n: int) -> NDArray[np.bool_]:
        """Return the mask of words at which an n-gram starts; a text of fewer than n words is a single n-gram."""
        starts_short_text: NDArray[np.bool_] = (self.size < n) & (self.left == self.size)
        return starts_short_text | (self.left >= n)

    def ngrams(self, n: int) -> tuple[Hashes, Integers]:
        """Return uniformly distributed hashes of all n-grams in order, and the number of n-grams of each text."""
        ngram_hashes = np.zeros(len(self.hashes), dtype=np.uint64)
        for length, hashes in self.runs(n):
            ngram_hashes = np.where(self.size >= length, hashes, ngram_hashes)
        starts = self.starts(n)
        return mixed(ngram_hashes[starts]), np.bincount(self.text[starts], minlength=self.texts)


def mixed(values: Hashes) -> Hashes:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014): every input bit affects every output bit."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
