"""Tokenize texts in pieces: the tokens of a piece do not depend on the pieces after it, and never span two pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from tunery.models.chat_template import ChatTemplate
from tunery.models.template_input import ESCAPED
from tunery.models.template_rendering import last_match

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IDS_ONLY: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
"""Arguments of a tokenizer that returns nothing but ids."""
_CONCATENATES: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
"""Cached results of `_concatenates`."""
_PREFIXES = ("\n", "x", "0", ".", "@")
"""Characters to prepend to a text that continues another."""
_UNKNOWN_CONTEXT = "\ufdd2"
"""A context that can't be passed to the tokenizer, because it contains an escaped special token."""


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, split_special: bool = False) -> list[list[int]]:
    """Return the ids of each text, without added special tokens."""
    if not any(texts):
        return [[] for _ in texts]
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=split_special, **IDS_ONLY
    )["input_ids"]
    return ids


def tokenize_pieces(texts: Sequence[Sequence[str]], template: ChatTemplate) -> list[list[list[int]]]:
    """Return the ids of each piece of each text. Tokens never span two pieces, because generation starts at the end of
    a piece. Escaped special tokens (models/template_input.py) are encoded as ordinary text."""
    needs_context = not _concatenates(template.tokenizer)
    parts: list[_Part] = []
    part_indices: list[list[list[int]]] = []  # of each piece of each text
    for pieces in texts:
        text_indices, context = [], ""
        for piece in pieces:
            piece_indices = []
            # The pattern has one group, so that every second part is the index of an escaped token.
            for index, part in enumerate(ESCAPED.split(piece) if "\ufdd2" in piece else (piece,)):
                is_escaped = index % 2 == 1
                if not part:
                    continue
                piece_indices.append(len(parts))
                parts.append(_Part(context, template.control_tokens[int(part)] if is_escaped else part, is_escaped))
                if needs_context:
                    context = _UNKNOWN_CONTEXT if is_escaped else _since_special(context + part, template)
            text_indices.append(piece_indices)
        part_indices.append(text_indices)
    if needs_context:
        ids = _tokenize_in_context(parts, template.tokenizer)
    else:
        ids = tokenize([part.text for part in parts], template.tokenizer)
        escaped = [index for index, part in enumerate(parts) if part.is_escaped]
        escaped_ids = _tokenize_as_text([parts[index].text for index in escaped], template.tokenizer)
        for index, token_ids in zip(escaped, escaped_ids, strict=True):
            ids[index] = token_ids
    return [
        [list(chain.from_iterable(ids[index] for index in piece_indices)) for piece_indices in text_indices]
        for text_indices in part_indices
    ]


@dataclass(frozen=True)
class _Part:
    """A part of a piece: ordinary text, or one escaped special token."""

    context: str
    """Text before it, from the last special token on."""
    text: str
    is_escaped: bool
    """Whether it is a special token, to be encoded as ordinary text."""


def _since_special(text: str, template: ChatTemplate) -> str:
    """Return the text from its last special token on: tokenizers split a text there."""
    last = last_match(template.control, text, 0, len(text))
    return text if last is None else text[last.start() :]


def _tokenize_in_context(parts: Sequence[_Part], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the ids of parts, for tokenizers that prepend a space to any text (Llama 2).

    Context and text are tokenised together. If the result starts with the ids of the context, the other ids are those
    of the text. Otherwise a token spans the boundary, and the text is tokenised after a character whose ids are
    removed.
    """
    ids_by_part: list[list[int]] = [[] for _ in parts]
    with_context = [
        index for index, part in enumerate(parts) if not part.is_escaped and _UNKNOWN_CONTEXT not in part.context
    ]
    context_ids = tokenize([parts[index].context for index in with_context], tokenizer)
    joined_ids = tokenize([parts[index].context + parts[index].text for index in with_context], tokenizer)
    remaining = sorted(set(range(len(parts))) - set(with_context))
    for index, before, joined in zip(with_context, context_ids, joined_ids, strict=True):
        if joined[: len(before)] == before:
            ids_by_part[index] = joined[len(before) :]
        else:
            remaining.append(index)
    for index in remaining:
        ids_by_part[index] = _tokenize_after_prefix(parts[index].text, tokenizer, parts[index].is_escaped)
    return ids_by_part


def _tokenize_after_prefix(text: str, tokenizer: PreTrainedTokenizerBase, as_text: bool) -> list[int]:
    """Return the ids of a text that continues another, tokenised after one of `_PREFIXES`. `as_text`: special tokens in
    it are encoded as ordinary text."""
    for prefix in _PREFIXES:
        before, joined = tokenize([prefix, prefix + text], tokenizer, split_special=as_text)
        if joined[: len(before)] != before:
            continue
        ids = joined[len(before) :]
        if as_text and len(text) > 1 and not set(ids).isdisjoint(tokenizer.added_tokens_decoder):
            return [token for part in (text[:-1], text[-1]) for token in _tokenize_after_prefix(part, tokenizer, True)]
        return ids
    return tokenize([text], tokenizer, split_special=as_text)[0]


def _tokenize_as_text(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Encode special tokens as ordinary text. Tokenizers never split added tokens that are not special, so those are
    split before their last character."""
    encoded = tokenize(tokens, tokenizer, split_special=True)
    added = set(tokenizer.added_tokens_decoder)
    for index, ids in enumerate(encoded):
        if not added.isdisjoint(ids):
            encoded[index] = list(chain.from_iterable(tokenize([tokens[index][:-1], tokens[index][-1]], tokenizer)))
    return encoded


def _concatenates(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the concatenated ids of two texts decode to the concatenated texts."""
    result = _CONCATENATES.get(tokenizer)
    if result is None:
        pairs = [("x", "y"), ("x:", " y"), ("x\n", "y"), ("x", "\ny")]
        result = _CONCATENATES[tokenizer] = all(
            _decode(tokenize([left], tokenizer)[0] + tokenize([right], tokenizer)[0], tokenizer)
            == _decode(tokenize([left + right], tokenizer)[0], tokenizer)
            for left, right in pairs
        )
    return result


def _decode(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
