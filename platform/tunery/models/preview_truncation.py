"""What truncation removes from a sequence, for its preview."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tunery.models.preview_sequences import PreviewSequence, special_tokens, token_groups

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_CUT_TOKENS = 200
"""Tokens of what truncation cuts off that are shown."""


def with_cut(one: PreviewSequence, whole: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> PreviewSequence:
    """With what truncation removed from `whole`, where the rest is one piece of it, or two."""
    kept, count = list(one.ids), len(one.ids)
    missing = len(whole) - count
    if missing <= 0:
        return one
    start = next((at for at in (0, missing) if list(whole[at : at + count]) == kept), None)
    if start is None:
        start = 0
        while start < count and whole[start] == kept[start]:
            start += 1
        if list(whole[start + missing :]) != kept[start:]:
            return replace(one, cut_tokens=missing)
        start = _turn_begin(whole, start, missing, tokenizer)
        begin, at = start, start
    else:
        begin, at = (count, count) if start == 0 else (0, 0)
    end = begin + missing
    if at or not kept:
        end = min(end, begin + MAX_CUT_TOKENS)
    else:
        begin = max(begin, end - MAX_CUT_TOKENS)
    cut = tuple(token_groups(whole, tokenizer, start=begin, stop=end))
    return replace(one, cut=cut, cut_at=at, cut_tokens=missing)


def _turn_begin(whole: Sequence[int], start: int, missing: int, tokenizer: PreTrainedTokenizerBase) -> int:
    """Of all indices from which `missing` tokens can be cut with the same rest, the last one up to `start` that has a
    special token: turns begin alike, so what is left alone says no more than that."""
    special = special_tokens(tokenizer)
    at = start
    while whole[at] not in special:
        if not at or whole[at - 1] != whole[at + missing - 1]:
            return start
        at -= 1
    return at
