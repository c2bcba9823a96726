"""The rows of a step of all members, cut into blocks that one forward pass takes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby


@dataclass(frozen=True)
class Block:
    """The rows `first` to `last` (left out) of each of `members`, as many of each: a rectangle, so that the adapters'
    matrices are multiplied in one batch."""

    members: tuple[int, ...]
    first: int
    last: int


def blocks(lengths: Sequence[Sequence[int]], budget: int) -> Iterator[Block]:
    """`lengths`: tokens of each row, by member, longest first. A block's padded size stays within `budget` tokens, as
    long as that leaves one row of one member. Every row is in exactly one block."""
    most = max(map(len, lengths), default=0)
    for members, run in groupby(range(most), key=lambda row: _having(lengths, row)):
        rows = list(run)
        while rows:
            # The longest row of a block is one of its first ones.
            widths = [lengths[member][rows[0]] for member in members]
            together = _together(widths, budget)
            height = min(len(rows), max(1, budget // (max(widths) * together)))
            for start in range(0, len(members), together):
                yield Block(members[start : start + together], rows[0], rows[0] + height)
            rows = rows[height:]


def _having(lengths: Sequence[Sequence[int]], row: int) -> tuple[int, ...]:
    """Members with so many rows, those with like lengths beside each other."""
    return tuple(
        sorted((member for member in range(len(lengths)) if len(lengths[member]) > row), key=lambda m: -lengths[m][0])
    )


def _together(widths: Sequence[int], budget: int) -> int:
    """How many members one block takes."""
    return max(1, min(len(widths), budget // max(widths)))
