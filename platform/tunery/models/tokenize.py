"""Text to token ids, where a text is put together from pieces whose tokens must not depend on each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tunery.models.chat_template import ESCAPED, ChatTemplate
from tunery.models.template_rendering import last_match

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDS_ONLY: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
_JOINABLE: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_LEADS = ("\n", "x", "0", ".", "@")
"""Characters to put before a text that continues another."""


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, split_special: bool = False) -> list[list[int]]:
    """Ids of each text, without the special tokens that the tokenizer would add."""
    if not any(texts):
        return [[] for _ in texts]
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=split_special, **IDS_ONLY
    )["input_ids"]
    return ids


def tokenize_pieces(texts: Sequence[Sequence[str]], template: ChatTemplate) -> list[list[list[int]]]:
    """Ids of each piece of each text, of which a piece is never merged with the next: generation begins where one ends.
    Special tokens that are `ESCAPED` become ordinary text."""
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
"""Precedes a text whose context can't be given to the tokenizer: a special token in it stands for ordinary text."""


def _since_special(text: str, template: ChatTemplate) -> str:
    """From the last special token on: a tokenizer splits a text there."""
    last = last_match(template.control, text, 0, len(text))
    return text if last is None else text[last.start() :]


def _continued(parts: Sequence[tuple[str, str, bool]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of texts by a tokenizer that puts a space before whatever it is given (Llama 2's).

    They are what follows the ids of the preceding text in those of both texts together, where these begin with those.
    Else (a token spans the boundary) a text is tokenised behind a character whose tokens are then left out.
    """
    found: list[list[int]] = [[] for _ in parts]
    within = [number for number, (before, _, escaped) in enumerate(parts) if not escaped and "\ufdd2" not in before]
    preceding = tokenize([parts[number][0] for number in within], tokenizer)
    joined = tokenize([parts[number][0] + parts[number][1] for number in within], tokenizer)
    rest = sorted(set(range(len(parts))) - set(within))
    for number, before, both in zip(within, preceding, joined, strict=True):
        if both[: len(before)] == before:
            found[number] = both[len(before) :]
        else:
            rest.append(number)
    for number in rest:
        _, text, escaped = parts[number]
        found[number] = _behind_lead(text, tokenizer, escaped)
    return found


def _behind_lead(text: str, tokenizer: PreTrainedTokenizerBase, as_text: bool) -> list[int]:
    """Ids of a text that continues another."""
    for lead in _LEADS:
        before, both = tokenize([lead, lead + text], tokenizer, split_special=as_text)
        if both[: len(before)] != before:
            continue
        ids = both[len(before) :]
        if as_text and len(text) > 1 and not set(ids).isdisjoint(tokenizer.added_tokens_decoder):
            return [token for part in (text[:-1], text[-1]) for token in _behind_lead(part, tokenizer, True)]
        return ids
    return tokenize([text], tokenizer, split_special=as_text)[0]


def _as_text(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Special tokens as ordinary text. An added token that is not special is no text to any tokenizer: it is taken
    apart before its last character."""
    found = tokenize(tokens, tokenizer, split_special=True)
    added = set(tokenizer.added_tokens_decoder)
    for index, ids in enumerate(found):
        if not added.isdisjoint(ids):
            found[index] = list(chain.from_iterable(tokenize([tokens[index][:-1], tokens[index][-1]], tokenizer)))
    return found


def _joins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of two texts, one after the other, stand for both texts joined."""
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
