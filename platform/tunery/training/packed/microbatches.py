"""Split the rows of all members in one step into micro batches within a token budget. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PackedMicroBatch:
    """Rows of some members for one forward pass. Each member is padded to the same number of tokens, because torch.bmm
    applies the adapters."""

    members: tuple[int, ...]
    """Indices of the members in the pack."""
    rows: tuple[tuple[int, ...], ...]
    """For each of `members`, indices of its rows in the member's batch."""


def microbatches(lengths: Sequence[Sequence[int]], budget: int, fixed_cost: int) -> Iterator[PackedMicroBatch]:
    """Yield micro batches that contain each row exactly once, for models that take concatenated rows.

    lengths: number of tokens of each row, by member. budget: maximum number of tokens, including padding, unless a
    single row is longer. fixed_cost: constant cost of a forward and backward pass, in tokens. Greedy: the next micro
    batch is the one with the most tokens without padding per cost.
    """
    remaining = [_longest_first(member_lengths) for member_lengths in lengths]
    while any(remaining):
        tokens = [sum(lengths[member][row] for row in rows) for member, rows in enumerate(remaining)]
        members = sorted((member for member, rows in enumerate(remaining) if rows), key=lambda member: -tokens[member])
        longest = [lengths[member][remaining[member][0]] for member in members]
        count, width = _best_shape([tokens[member] for member in members], longest, budget, fixed_cost)
        selected = {member: _first_fit(remaining[member], lengths[member], width) for member in sorted(members[:count])}
        for member, rows in selected.items():
            remaining[member] = [row for row in remaining[member] if row not in rows]
        yield PackedMicroBatch(tuple(selected), tuple(map(tuple, selected.values())))


def padded_microbatches(lengths: Sequence[Sequence[int]], budget: int) -> Iterator[PackedMicroBatch]:
    """The same for models that take one row per sequence: equally many rows of each member, padded to the longest."""
    remaining = [_longest_first(member_lengths) for member_lengths in lengths]
    while any(remaining):
        longest_rows = {member: lengths[member][rows[0]] for member, rows in enumerate(remaining) if rows}
        members = sorted(longest_rows, key=lambda member: -longest_rows[member])
        longest = longest_rows[members[0]]
        members = members[: max(1, budget // longest)]
        num_rows = min(len(remaining[member]) for member in members)
        num_rows = min(num_rows, max(1, budget // (longest * len(members))))
        yield PackedMicroBatch(tuple(members), tuple(tuple(remaining[member][:num_rows]) for member in members))
        for member in members:
            remaining[member] = remaining[member][num_rows:]


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda row: -lengths[row])


def _best_shape(tokens: Sequence[int], longest: Sequence[int], budget: int, fixed_cost: int) -> tuple[int, int]:
    """Return (number of members, tokens per member) of the next micro batch.

    tokens: number of remaining tokens of each member, descending; longest: length of the longest remaining row of each.
    """
    best_shape, best_efficiency = (1, longest[0]), 0.0
    for count in range(1, len(tokens) + 1):
        min_width = max(longest[:count])
        for candidate in {*tokens[:count], budget // count}:
            width = max(min_width, min(candidate, budget // count))
            if count > 1 and count * width > budget:
                continue
            num_tokens = sum(min(remaining, width) for remaining in tokens[:count])
            efficiency = num_tokens / (fixed_cost + count * min(width, tokens[0]))
            if efficiency > best_efficiency:
                best_shape, best_efficiency = (count, width), efficiency
    return best_shape


def _first_fit(rows: Sequence[int], lengths: Sequence[int], width: int) -> list[int]:
    """Select rows in order, each if it still fits into `width` tokens."""
    selected: list[int] = []
    free = width
    for row in rows:
        if lengths[row] <= free:
            selected.append(row)
            free -= lengths[row]
    return selected
