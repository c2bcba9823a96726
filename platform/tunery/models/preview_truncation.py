"""Find the positions at which truncation removes tokens from a sequence, for its preview.

An encoding returns the kept tokens without their original positions, and equal tokens occur at many positions.
`kept_indices` follows the steps of each truncation policy. `truncate: left` first drops the oldest messages, then
truncates the start of the prompt and the end of the response. The start of the response is the start of the last span,
before and after each step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

from tunery.models.encode import Encoded, Encoding, Span, Truncation, encode_untruncated
from tunery.models.preview_sequences import Cut, PreviewSequence, special_tokens, token_groups
from tunery.models.truncation import without_oldest_turns
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CUT_TOKENS = 200
"""Maximum displayed tokens of each cut."""
UNKNOWN_CUT = (
    "the positions of the removed tokens are unknown: the kept text is encoded differently in the complete row"
)


@dataclass(frozen=True)
class Untruncated:
    """A row's sequence before truncation."""

    full: Encoded
    shorter: Encoded
    """The sequence without the oldest messages, if `truncate: left` drops any before it truncates tokens; otherwise
    `full`."""
    responses: tuple[Span, ...]
    """Spans of all assistant messages in `full`, with or without a loss."""
    is_text: bool


def untruncated(
    row: Row,
    encode_rows: Callable[[Sequence[Row]], list[Encoded]],
    sides_of: Callable[[Row], list[Row]],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
) -> list[Untruncated]:
    """Encode each side of a row that is too long, with the function that encodes it for the stage. `sides_of` returns
    the row itself, or both rows of a preference pair."""
    sides = sides_of(row)
    full = encode_rows(sides)
    is_text = not row.get("messages")
    left = encoding.truncate == "left" and not is_text
    shorter = without_oldest_turns(row, encode_rows, sides_of, encoding.max_length) if left else None
    responses: list[tuple[Span, ...]] = [()] * len(sides)
    if not is_text:
        # `train_on` and weights change the spans, not the tokens.
        all_responses = replace(encoding, train_on="all_turns")
        unweighted = [
            {**side, "messages": [{**message, "weight": None} for message in side["messages"]]} for side in sides
        ]
        responses = [item.spans for item in encode_untruncated(unweighted, tokenizer, all_responses)]
    return [Untruncated(*sequences, is_text) for sequences in zip(full, shorter or full, responses, strict=True)]


def kept_indices(
    kept: Encoded, source: Untruncated, truncate: Truncation, tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """Return the index in `source.full` of each token of `kept`. None if the template renders the kept messages
    differently without the others, so that their tokens differ from those of `source.full`."""
    window = _window(kept, source.shorter, source.is_text, truncate, tokenizer)
    if source.shorter is not source.full and window is not None:
        indices = _without_messages(source, source.shorter.ids, tokenizer)
        window = [indices[index] for index in window] if indices is not None else None
    if window is None:
        # The part that is rendered differently may be truncated anyway.
        window = _window(kept, source.full, source.is_text, truncate, tokenizer)
    if window is None and truncate == "split":
        window = _without_messages(source, kept.ids, tokenizer)
    return window


def kept_of_text(full: Sequence[int], kept: Sequence[int]) -> list[int] | None:
    """Return the index in `full` of each token of a text that the tokenizer truncates before its final special tokens.
    None if the tokenizer truncates both texts of a pair."""
    starts = _one_cut(full, kept)
    return None if starts is None else _without(full, starts[-1], len(full) - len(kept))


def cut_positions(kept: Sequence[int], total: int) -> list[tuple[int, int, int]]:
    """Return (index of the kept token after the cut, start and end in the complete sequence) of each cut. `kept`: index
    of each kept token in the complete sequence, which has `total` tokens."""
    positions = []
    expected = 0
    for index, source in enumerate([*kept, total]):
        if source > expected:
            positions.append((index, expected, source))
        expected = source + 1
    return positions


def with_cuts(
    sequence: PreviewSequence,
    full: Sequence[int],
    positions: Sequence[tuple[int, int, int]] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> PreviewSequence:
    """Return the sequence with its cuts from `full`. `positions`: see `cut_positions`; None if unknown."""
    if positions is None:
        num_cut = max(0, len(full) - len(sequence.ids))
        return replace(sequence, cut_tokens=num_cut, notes=(*sequence.notes, UNKNOWN_CUT))
    cuts = []
    for index, begin, end in positions:
        # Of a long cut, the tokens next to the kept ones are displayed.
        at_beginning = index == 0 and bool(sequence.ids)
        start = max(begin, end - MAX_CUT_TOKENS) if at_beginning else begin
        stop = end if at_beginning else min(end, begin + MAX_CUT_TOKENS)
        groups = token_groups(full, tokenizer, start=start, stop=stop)
        cuts.append(Cut(index, tuple(groups), start - begin, end - stop))
    return replace(sequence, cuts=tuple(cuts), cut_tokens=sum(end - begin for _, begin, end in positions))


def _window(
    kept: Encoded, source: Encoded, is_text: bool, truncate: Truncation, tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """Return the index in `source` of each token of `kept` if `kept` is a contiguous part of it, with `left` possibly
    after the BOS token; otherwise None."""
    offset, bos = 0, 0
    if truncate == "left" and is_text:
        offset = len(source.ids) - len(kept.ids)
    elif truncate in ("left", "split") and (kept.spans or not source.spans):
        offset = source.response[0] - kept.response[0]
    if truncate == "left" and offset and kept.ids[:1] == source.ids[:1] == [tokenizer.bos_token_id]:
        bos = 1
    window = [*range(bos), *range(offset + bos, offset + len(kept.ids))]
    inside = offset >= 0 and offset + len(kept.ids) <= len(source.ids)
    return window if inside and [source.ids[index] for index in window] == kept.ids else None


def _without_messages(
    source: Untruncated, remaining: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """Return the index in the complete conversation of each token of `remaining`, which lacks its oldest messages.

    Messages begin and end with the same tokens, so several cuts leave the same sequence. The first dropped message
    begins before the first response, and the last one ends after a response. Of the cuts in between, the one at the
    first special token is taken, since a message begins with it.
    """
    full = source.full.ids
    num_cut = len(full) - len(remaining)
    starts = _one_cut(full, remaining)
    if starts is None:
        return None
    last = min([starts[-1], *(begin for begin, _ in source.responses[:1])])
    first = max([starts[0], *(end - num_cut for _, end in source.responses if end <= last + num_cut)])
    if first > last:
        return None
    special = special_tokens(tokenizer)
    start = next((index for index in range(first, last + 1) if num_cut and full[index] in special), first)
    return _without(full, start, num_cut)


def _one_cut(full: Sequence[int], remaining: Sequence[int]) -> range | None:
    """Return the indices in `full` at which removing adjacent tokens leaves `remaining`; None if there is none."""
    num_cut = len(full) - len(remaining)
    if num_cut < 0:
        return None
    num_same_start = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(full, remaining, strict=False)))
    backwards = zip(reversed(full), reversed(remaining), strict=False)
    num_same_end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards))
    return (
        range(len(remaining) - num_same_end, num_same_start + 1)
        if num_same_start + num_same_end >= len(remaining)
        else None
    )


def _without(full: Sequence[int], start: int, num_cut: int) -> list[int]:
    return [*range(start), *range(start + num_cut, len(full))]
