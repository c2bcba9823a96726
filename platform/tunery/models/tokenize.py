"""Tokenize texts in pieces whose tokens must not depend on each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tunery.models.chat_template import ChatTemplate
from tunery.models.template_input import ESCAPED
from tunery.models.template_rendering import last_match

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDS_ONLY: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
_JOINABLE: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_LEADS = ("\n", "x", "0", ".", "@")
"""Characters to prepend to a text that continues another."""


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, split_special: bool = False) -> list[list[int]]:
    """Return the ids of each text, without added special tokens."""
    if not any(texts):
        return [[] for _ in texts]
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=split_special, **IDS_ONLY
    )["input_ids"]
    return ids


def tokenize_pieces(texts: Sequence[Sequence[str]], template: ChatTemplate) -> list[list[list[int]]]:
    """Return the ids of each piece of each text. Tokens never span two pieces, because generation starts where a piece
    ends. `ESCAPED` special tokens are encoded as ordinary text."""
    continued = not _joins(template.tokenizer)
    parts: list[tuple[str, str, bool]] = []  # (what precedes it, text, whether it is a special token as ordinary text)
    where: list[list[list[int]]] = []
    for pieces in texts:
        places, before = [], ""
        for piece in pieces:
            numbers = []
            for number, part in enumerate(ESCAPED.split(piece) if "\ufdd2" in piece else (piece,)):
                escaped = number % 2 == 1
                if not part:
                    continue
                numbers.append(len(parts))
                parts.append((before, template.control_tokens[int(part)] if escaped else part, escaped))
                if continued:
                    before = _ESCAPED_BEFORE if escaped else _since_special(before + part, template)
            places.append(numbers)
        where.append(places)
    if continued:
        ids = _continued(parts, template.tokenizer)
    else:
        ids = tokenize([text for _, text, _ in parts], template.tokenizer)
        literal = [number for number, (_, _, escaped) in enumerate(parts) if escaped]
        found = _as_text([parts[number][1] for number in literal], template.tokenizer)
        for number, tokens in zip(literal, found, strict=True):
            ids[number] = tokens
    return [[list(chain.from_iterable(ids[number] for number in numbers)) for numbers in places] for places in where]


_ESCAPED_BEFORE = "\ufdd2"
"""Marks a context that can't be passed to the tokenizer, because it contains an escaped special token."""


def _since_special(text: str, template: ChatTemplate) -> str:
    """Return the text from its last special token on, where tokenizers split a text."""
    last = last_match(template.control, text, 0, len(text))
    return text if last is None else text[last.start() :]


def _continued(parts: Sequence[tuple[str, str, bool]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of texts that continue another, for tokenizers that prepend a space to any text (Llama 2).

    Context and text are tokenised together. If the result starts with the ids of the context, the rest are the ids of
    the text. Otherwise (a token spans the boundary) the text is tokenised after a character whose tokens are dropped.
    """
    ids_by_part: list[list[int]] = [[] for _ in parts]
    within = [number for number, (before, _, escaped) in enumerate(parts) if not escaped and "\ufdd2" not in before]
    preceding = tokenize([parts[number][0] for number in within], tokenizer)
    joined = tokenize([parts[number][0] + parts[number][1] for number in within], tokenizer)
    rest = sorted(set(range(len(parts))) - set(within))
    for number, before, both in zip(within, preceding, joined, strict=True):
        if both[: len(before)] == before:
            ids_by_part[number] = both[len(before) :]
        else:
            rest.append(number)
    for number in rest:
        _, text, escaped = parts[number]
        ids_by_part[number] = _tokenize_after_lead(text, tokenizer, escaped)
    return ids_by_part


def _tokenize_after_lead(text: str, tokenizer: PreTrainedTokenizerBase, as_text: bool) -> list[int]:
    """Return the ids of a text that continues another, tokenised after one of `_LEADS`."""
    for lead in _LEADS:
        before, both = tokenize([lead, lead + text], tokenizer, split_special=as_text)
        if both[: len(before)] != before:
            continue
        ids = both[len(before) :]
        if as_text and len(text) > 1 and not set(ids).isdisjoint(tokenizer.added_tokens_decoder):
            return [token for part in (text[:-1], text[-1]) for token in _tokenize_after_lead(part, tokenizer, True)]
        return ids
    return tokenize([text], tokenizer, split_special=as_text)[0]


def _as_text(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Encode special tokens as ordinary text. Tokenizers never split added tokens that are not special, so those are
    split before their last character."""
    encoded = tokenize(tokens, tokenizer, split_special=True)
    added = set(tokenizer.added_tokens_decoder)
    for index, ids in enumerate(encoded):
        if not added.isdisjoint(ids):
            encoded[index] = list(chain.from_iterable(tokenize([tokens[index][:-1], tokens[index][-1]], tokenizer)))
    return encoded


def _joins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the concatenated ids of two texts decode to the concatenated texts."""
    known = _JOINABLE.get(tokenizer)
    if known is None:
        pairs = [("x", "y"), ("x:", " y"), ("x\n", "y"), ("x", "\ny")]
        known = _JOINABLE[tokenizer] = all(
            _decoded(tokenize([left], tokenizer)[0] + tokenize([right], tokenizer)[0], tokenizer)
            == _decoded(tokenize([left + right], tokenizer)[0], tokenizer)
            for left, right in pairs
        )
    return known


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
