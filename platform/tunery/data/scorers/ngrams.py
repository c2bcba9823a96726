"""64-bit hashes of a text's word n-grams, in numpy: a text of n words takes n numbers, not n strings of n-grams."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

Hashes = NDArray[np.uint64]

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's hash is lost by multiplying


def word_hashes(texts: Sequence[Iterable[str]]) -> list[Hashes]:
    """A hash a word, for each text; equal in every process."""
    return [np.array(hashes, dtype=np.uint64) for hashes in RMinHash.hash_token_sets(texts)]


def ngram_hashes(hashed: Hashes, n: int) -> Hashes:
    """Of a text's word hashes, in the text's order: a hash an n-gram, one for a text of fewer words, none for none."""
    n = min(n, len(hashed))
    if n == 0:
        return hashed
    count = len(hashed) - n + 1
    rolled = np.zeros(count, dtype=np.uint64)
    for place in range(n):
        rolled = rolled * _BASE + hashed[place : place + count]
    return mixed(rolled)


def mixed(values: Hashes) -> Hashes:
    """The finalizer of SplitMix64 (Steele et al. 2014): every bit of a value moves every bit of the result."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
