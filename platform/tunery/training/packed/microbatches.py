"""The rows of a step of all members, cut into blocks that one forward pass takes. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class MicroBatchBlock:
    """Some rows of some members. Each member has as many tokens in it as the one with the most, padding included: the
    adapters' matrices are multiplied in one batch."""

    members: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    """Of each of `members`."""


def microbatches(lengths: Sequence[Sequence[int]], budget: int, fixed: int) -> Iterator[MicroBatchBlock]:
    """`lengths`: tokens of each row, by member. A block's padded size stays within `budget` tokens, as long as that
    leaves one row of one member. `fixed`: what a forward and a backward pass take however small they are, in tokens.
    Every row is in exactly one block.

    Greedy: the next block is the one with the most tokens learned from for what it takes.
    """
    left = [sorted(range(len(own)), key=lambda row: -own[row]) for own in lengths]
    while any(left):
        rest = [sum(own[row] for row in rows) for own, rows in zip(lengths, left, strict=True)]
        members = sorted((m for m in range(len(left)) if left[m]), key=lambda m: -rest[m])
        count, width = _best([rest[m] for m in members], [lengths[m][left[m][0]] for m in members], budget, fixed)
        taken = {member: _fitting(left[member], lengths[member], width) for member in sorted(members[:count])}
        for member, rows in taken.items():
            left[member] = [row for row in left[member] if row not in rows]
        yield MicroBatchBlock(tuple(taken), tuple(map(tuple, taken.values())))


def padded_microbatches(lengths: Sequence[Sequence[int]], budget: int) -> Iterator[MicroBatchBlock]:
    """The same for rows that lie below each other: as many of each member, each as long as the longest one."""
    left = [sorted(range(len(own)), key=lambda row: -own[row]) for own in lengths]
    while any(left):
        members = sorted((m for m in range(len(left)) if left[m]), key=lambda m: -lengths[m][left[m][0]])
        longest = lengths[members[0]][left[members[0]][0]]
        members = members[: max(1, budget // longest)]
        height = min(min(len(left[m]) for m in members), max(1, budget // (longest * len(members))))
        yield MicroBatchBlock(tuple(members), tuple(tuple(left[m][:height]) for m in members))
        for member in members:
            left[member] = left[member][height:]


def _best(rest: Sequence[int], longest: Sequence[int], budget: int, fixed: int) -> tuple[int, int]:
    """How many of the members, those with the most tokens left first, and how many tokens of each."""
    found, best = (1, longest[0]), 0.0
    for count in range(1, len(rest) + 1):
        least = max(longest[:count])
        for wanted in {*rest[:count], budget // count}:
            width = max(least, min(wanted, budget // count))
            if count > 1 and count * width > budget:
                continue
            learned = sum(min(tokens, width) for tokens in rest[:count])
            value = learned / (fixed + count * min(width, rest[0]))
            if value > best:
                found, best = (count, width), value
    return found


def _fitting(rows: Sequence[int], lengths: Sequence[int], width: int) -> list[int]:
    """Those that fit, the longest first."""
    taken: list[int] = []
    room = width
    for row in rows:
        if lengths[row] <= room:
            taken.append(row)
            room -= lengths[row]
    return taken
