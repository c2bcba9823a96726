"""Split the rows of one step of all members into micro batches of at most `budget` tokens. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PackedMicroBatch:
    """Rows of some members for one forward pass. Each member is padded to the same number of tokens, because
    the adapters are applied with torch.bmm."""

    members: tuple[int, ...]
    rows: tuple[tuple[int, ...], ...]
    """Row indices of each of `members`."""


def microbatches(lengths: Sequence[Sequence[int]], budget: int, fixed: int) -> Iterator[PackedMicroBatch]:
    """Yield micro batches that hold each row exactly once; the rows of a member are concatenated.

    `lengths`: tokens of each row, by member. The padded size is at most `budget` tokens, unless a single row is longer.
    `fixed`: constant cost of a forward and backward pass, in tokens. Greedy: the next micro batch is the one with the
    most non-padding tokens per cost.
    """
    remaining = [sorted(range(len(member)), key=lambda row: -member[row]) for member in lengths]
    while any(remaining):
        tokens = [sum(member[row] for row in rows) for member, rows in zip(lengths, remaining, strict=True)]
        members = sorted((m for m in range(len(remaining)) if remaining[m]), key=lambda m: -tokens[m])
        longest = [lengths[m][remaining[m][0]] for m in members]
        count, width = _best_shape([tokens[m] for m in members], longest, budget, fixed)
        chosen = {m: _first_fit(remaining[m], lengths[m], width) for m in sorted(members[:count])}
        for member, rows in chosen.items():
            remaining[member] = [row for row in remaining[member] if row not in rows]
        yield PackedMicroBatch(tuple(chosen), tuple(map(tuple, chosen.values())))


def padded_microbatches(lengths: Sequence[Sequence[int]], budget: int) -> Iterator[PackedMicroBatch]:
    """The same for models that take one row per sequence: equally many rows of each member, padded to the longest."""
    remaining = [sorted(range(len(member)), key=lambda row: -member[row]) for member in lengths]
    while any(remaining):
        members = sorted((m for m in range(len(remaining)) if remaining[m]), key=lambda m: -lengths[m][remaining[m][0]])
        longest = lengths[members[0]][remaining[members[0]][0]]
        members = members[: max(1, budget // longest)]
        height = min(min(len(remaining[m]) for m in members), max(1, budget // (longest * len(members))))
        yield PackedMicroBatch(tuple(members), tuple(tuple(remaining[m][:height]) for m in members))
        for member in members:
            remaining[member] = remaining[member][height:]


def _best_shape(tokens: Sequence[int], longest: Sequence[int], budget: int, fixed: int) -> tuple[int, int]:
    """Return (number of members, tokens per member) of the next micro batch. Members are sorted by remaining tokens,
    descending; `longest`: length of the longest remaining row of each."""
    best_shape, best_efficiency = (1, longest[0]), 0.0
    for count in range(1, len(tokens) + 1):
        min_width = max(longest[:count])
        for candidate in {*tokens[:count], budget // count}:
            width = max(min_width, min(candidate, budget // count))
            if count > 1 and count * width > budget:
                continue
            useful = sum(min(remaining, width) for remaining in tokens[:count])
            efficiency = useful / (fixed + count * min(width, tokens[0]))
            if efficiency > best_efficiency:
                best_shape, best_efficiency = (count, width), efficiency
    return best_shape


def _first_fit(rows: Sequence[int], lengths: Sequence[int], width: int) -> list[int]:
    """Select rows in order, as long as they fit into `width` tokens."""
    selected: list[int] = []
    free = width
    for row in rows:
        if lengths[row] <= free:
            selected.append(row)
            free -= lengths[row]
    return selected
