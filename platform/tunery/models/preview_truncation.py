"""Where truncation removes tokens from a sequence, for its preview.

An encoding returns the tokens that are kept, not where they were: equal tokens occur in many positions. `kept_indices`
follows the steps of each policy. `truncate: left` first leaves out the oldest turns, then cuts the beginning of the
prompt and the end of the response; the response begins where the last span begins, before each step and after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import TYPE_CHECKING

from tunery.models.encode import Encoded, Encoding, Span, Truncation, encode_whole
from tunery.models.preview_sequences import Cut, PreviewSequence, special_tokens, token_groups
from tunery.models.truncation import without_oldest_turns
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CUT_TOKENS = 200
"""Tokens of each cut that are shown."""
UNKNOWN_CUT = "it can't be shown where tokens are cut off: what is kept is not encoded as in the complete row"


@dataclass(frozen=True)
class Untruncated:
    """A row's sequence before it is cut."""

    whole: Encoded
    shorter: Encoded
    """Without the oldest turns, where `truncate: left` leaves some out before it cuts tokens; else `whole`."""
    responses: tuple[Span, ...]
    """Of all assistant turns in `whole`, trained or not."""
    is_text: bool


def untruncated(
    row: Row,
    encode_rows: Callable[[Sequence[Row]], list[Encoded]],
    sides_of: Callable[[Row], list[Row]],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
) -> list[Untruncated]:
    """Each side of a row that is too long (the row itself, or both of a preference pair), by the functions that encode
    it for the stage."""
    sides = sides_of(row)
    whole = encode_rows(sides)
    is_text = not row.get("messages")
    left = encoding.truncate == "left" and not is_text
    shorter = without_oldest_turns(row, encode_rows, sides_of, encoding.max_length) if left else None
    responses: list[tuple[Span, ...]] = [()] * len(sides)
    if not is_text:
        # The tokens are the same whatever is trained.
        every_turn = replace(encoding, train_on="all_turns")
        unweighted = [{**side, "messages": [{**turn, "weight": None} for turn in side["messages"]]} for side in sides]
        responses = [item.spans for item in encode_whole(unweighted, tokenizer, every_turn)]
    return [Untruncated(*found, is_text) for found in zip(whole, shorter or whole, responses, strict=True)]


def kept_indices(
    kept: Encoded, source: Untruncated, truncate: Truncation, tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """The index in `source.whole` of each token of `kept`. None where the template renders the kept turns differently
    without the others, so that their tokens are not those of `source.whole`."""
    window = _window(kept, source.shorter, source.is_text, truncate, tokenizer)
    if source.shorter is not source.whole and window is not None:
        turns = _without_turns(source, source.shorter.ids, tokenizer)
        window = [turns[index] for index in window] if turns is not None else None
    if window is None:
        # What is rendered differently may be what is cut off anyway.
        window = _window(kept, source.whole, source.is_text, truncate, tokenizer)
    if window is None and truncate == "split":
        window = _without_turns(source, kept.ids, tokenizer)
    return window


def kept_of_text(whole: Sequence[int], kept: Sequence[int]) -> list[int] | None:
    """The same of a text that the tokenizer cuts before the special tokens at its end; None where it cuts both texts of
    a pair."""
    starts = _one_cut(whole, kept)
    return None if starts is None else _without(whole, starts[-1], len(whole) - len(kept))


def cut_positions(kept: Sequence[int], total: int) -> list[tuple[int, int, int]]:
    """(index in the kept sequence before which it was, begin and end in the complete one) of each cut, from the index
    of each kept token in the complete one of `total` tokens."""
    positions = []
    expected = 0
    for index, source in enumerate([*kept, total]):
        if source > expected:
            positions.append((index, expected, source))
        expected = source + 1
    return positions


def with_cuts(
    one: PreviewSequence,
    whole: Sequence[int],
    positions: Sequence[tuple[int, int, int]] | None,
    tokenizer: PreTrainedTokenizerBase,
) -> PreviewSequence:
    """The sequence with its cuts from `whole`. `positions` is None where they are unknown."""
    if positions is None:
        return replace(one, cut_tokens=max(0, len(whole) - len(one.ids)), notes=(*one.notes, UNKNOWN_CUT))
    cuts = []
    for index, begin, end in positions:
        # Of a long cut, the tokens next to those that are kept.
        at_beginning = index == 0 and bool(one.ids)
        start = max(begin, end - MAX_CUT_TOKENS) if at_beginning else begin
        stop = end if at_beginning else min(end, begin + MAX_CUT_TOKENS)
        groups = token_groups(whole, tokenizer, start=start, stop=stop)
        cuts.append(Cut(index, tuple(groups), start - begin, end - stop))
    return replace(one, cuts=tuple(cuts), cut_tokens=sum(end - begin for _, begin, end in positions))


def _window(
    kept: Encoded, source: Encoded, is_text: bool, truncate: Truncation, tokenizer: PreTrainedTokenizerBase
) -> list[int] | None:
    """The index in `source` of each token of `kept`, where `kept` is a part of it, behind its BOS token with `left`."""
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


def _without_turns(source: Untruncated, rest: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> list[int] | None:
    """The index in the complete conversation of each token of `rest`, which lacks its oldest turns.

    Turns begin and end alike, so several cuts leave the same tokens. The first turn that goes begins before the first
    response, and the last one ends behind one: of the cuts between, that at the first special token, with which a turn
    begins.
    """
    whole = source.whole.ids
    num_cut = len(whole) - len(rest)
    starts = _one_cut(whole, rest)
    if starts is None:
        return None
    last = min([starts[-1], *(begin for begin, _ in source.responses[:1])])
    first = max([starts[0], *(end - num_cut for _, end in source.responses if end <= last + num_cut)])
    if first > last:
        return None
    special = special_tokens(tokenizer)
    start = next((index for index in range(first, last + 1) if num_cut and whole[index] in special), first)
    return _without(whole, start, num_cut)


def _one_cut(whole: Sequence[int], rest: Sequence[int]) -> range | None:
    """The indices in `whole` at which a cut leaves `rest`; None where there is none."""
    num_cut = len(whole) - len(rest)
    if num_cut < 0:
        return None
    same_begin = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(whole, rest, strict=False)))
    backwards = zip(reversed(whole), reversed(rest), strict=False)
    same_end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], backwards))
    return range(len(rest) - same_end, same_begin + 1) if same_begin + same_end >= len(rest) else None


def _without(whole: Sequence[int], start: int, num_cut: int) -> list[int]:
    return [*range(start), *range(start + num_cut, len(whole))]
