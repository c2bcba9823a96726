"""Pseudorandom numbers that depend only on a key, so they are the same on every machine and Python version."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator


def hash_stream(*key: object) -> Iterator[int]:
    """Yield an endless stream of uniform 64-bit integers from BLAKE2b of the key and a counter."""
    start = hashlib.blake2b(repr(key).encode("utf-8", "backslashreplace"), digest_size=32).digest()
    block = 0
    while True:
        digest = hashlib.blake2b(start + block.to_bytes(8, "big")).digest()
        for offset in range(0, 64, 8):
            yield int.from_bytes(digest[offset : offset + 8], "big")
        block += 1


def shuffled(count: int, random_numbers: Iterator[int]) -> Iterator[int]:
    """Yield 0 to count - 1 in random order (a lazy Fisher-Yates shuffle)."""
    swapped: dict[int, int] = {}
    for index in range(count):
        other = index + next(random_numbers) % (count - index)
        yield swapped.get(other, other)
        swapped[other] = swapped.get(index, index)


def spread_evenly(fraction: float, copies: int, random_numbers: Iterator[int]) -> list[bool]:
    """Return a flag per copy, true for `fraction` of the copies.

    Systematic sampling with one random start: the number of true flags is floor or ceil of fraction * copies, and its
    expectation is exact.
    """
    start = (next(random_numbers) >> 11) / 2**53
    return [math.floor((copy + 1) * fraction + start) > math.floor(copy * fraction + start) for copy in range(copies)]
