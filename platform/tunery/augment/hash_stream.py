"""Draws that depend on their key alone: the same on every machine, Python and number of workers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator


def hash_stream(*key: object) -> Iterator[int]:
    """Endless 64-bit numbers, evenly spread, from BLAKE2b of the key and a counter."""
    start = hashlib.blake2b(repr(key).encode("utf-8", "backslashreplace"), digest_size=32).digest()
    block = 0
    while True:
        digest = hashlib.blake2b(start + block.to_bytes(8, "big")).digest()
        for place in range(0, 64, 8):
            yield int.from_bytes(digest[place : place + 8], "big")
        block += 1


def shuffled(count: int, drawn: Iterator[int]) -> Iterator[int]:
    """0 to count - 1 in random order (Fisher and Yates), worked out as far as it is asked for."""
    moved: dict[int, int] = {}
    for place in range(count):
        other = place + next(drawn) % (count - place)
        yield moved.get(other, other)
        moved[other] = moved.get(place, place)


def spread_evenly(share: float, copies: int, drawn: Iterator[int]) -> list[bool]:
    """True for `share` of the copies: floor or ceil of their number in each row, the share over many (systematic
    sampling with one random start)."""
    start = (next(drawn) >> 11) / 2**53
    return [math.floor((copy + 1) * share + start) > math.floor(copy * share + start) for copy in range(copies)]
