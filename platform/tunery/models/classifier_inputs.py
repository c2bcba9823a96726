"""Inputs of classifiers and embedding models: encoding of rows, and batches of tensors.

    a conversation, if the model's tokenizer has a chat template (reward models): the complete conversation rendered by
        the template, as in training (models/encode.py), without further special tokens; if it is too long, the oldest
        messages are dropped, then the start of the prompt
    a conversation, if the tokenizer has none (text classifiers): the messages before the last response, and that
        response, as a pair of texts if the tokenizer separates the texts of a pair ([SEP]), otherwise joined by a blank
        line; a conversation that ends with a user message is one text
    a text: unchanged, with the tokenizer's special tokens

Batches have an attention mask, because encoders attend in both directions. Models that pool the last token of a row
find it by the padding token, so rows are padded with the padding token of the model's config.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tunery.models.encode import Encoded, Encoding, encode_untruncated
from tunery.models.encode_preferences import check_pair, encode_responses, rejected_side
from tunery.models.encode_rows import TokenizedRow
from tunery.models.meta_model import position_limit
from tunery.store.rows import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_TOKEN = "it has no token"
NO_LABEL = "it has no label"
SAME_RESPONSES = "both responses have the same tokens"


class ClassifierEncoder:
    """Encodes rows for `model`, truncated to `max_length` tokens or to the model's maximum position."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._config = model.config.get_text_config()
        positions = position_limit(model)
        max_positions = max_length if positions is None else positions.tokens
        self.encoding = Encoding(int(min(max_length, tokenizer.model_max_length, max_positions)), "last_turn", "left")
        self._pad_token_id: int | None = self._config.pad_token_id
        takes_token_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._has_token_types = takes_token_types and "token_type_ids" in tokenizer.model_input_names

    def __call__(self, rows: Sequence[Row]) -> list[Encoded]:
        """Encode rows as model inputs."""
        return encode_classifier_inputs(rows, self._tokenizer, self.encoding)

    def tensors(self, batch: Sequence[Encoded], device: str | None = None) -> dict[str, torch.Tensor]:
        """Build input_ids and attention_mask, (rows, max length) int64, padded on the right, on `device` (default: the
        model's); also token_type_ids if the model was trained with them."""
        import torch

        max_length = max(len(item.ids) for item in batch)
        pad_token_id = self._pad_token_id
        if pad_token_id is None:
            # Without a padding token, a pooling model takes the last position of a row and rejects batches. With one it
            # takes the last token that is not padding: the same, if no row ends with the padding token.
            last_tokens = {item.ids[-1] for item in batch}
            pad_token_id = next(token for token in range(len(last_tokens) + 1) if token not in last_tokens)
            self._config.pad_token_id = pad_token_id
        padding = [max_length - len(item.ids) for item in batch]
        inputs = {
            "input_ids": [item.ids + [pad_token_id] * count for item, count in zip(batch, padding, strict=True)],
            "attention_mask": [[1] * len(item.ids) + [0] * count for item, count in zip(batch, padding, strict=True)],
        }
        if self._has_token_types:
            inputs["token_type_ids"] = [
                (item.token_types or [0] * len(item.ids)) + [0] * count
                for item, count in zip(batch, padding, strict=True)
            ]
        return {name: torch.tensor(values, device=device or self._model.device) for name, values in inputs.items()}


# Rows to tokens


def encode_classifier_inputs(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> list[Encoded]:
    """Encode rows as inputs of a classifier or embedding model, truncated to `encoding.max_length`, without a loss."""
    has_template = tokenizer.chat_template is not None
    encoded: dict[int, Encoded] = {}
    chats = [index for index, row in enumerate(rows) if row.get("messages") and has_template]
    encoded |= zip(chats, _encode_chats([rows[index] for index in chats], tokenizer, encoding), strict=True)
    as_pair = _separates_pairs(tokenizer)
    texts = {index: _texts_of(row, as_pair) for index, row in enumerate(rows) if index not in encoded}
    for count in (1, 2):  # single texts, then pairs
        indices = [index for index, row_texts in texts.items() if len(row_texts) == count]
        row_texts = [texts[index] for index in indices]
        encoded |= zip(indices, _encode_texts(row_texts, tokenizer, encoding.max_length), strict=True)
    return [encoded[index] for index in range(len(rows))]


def encode_unlabelled(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[TokenizedRow]:
    """Encode rows of a `classifier` stage whose data stages determine their labels."""
    for item in encode_classifier_inputs(rows, tokenizer, encoding):
        yield TokenizedRow([item], unusable=item.rejected or ("" if item.ids else NO_TOKEN))


def encode_labelled(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[TokenizedRow]:
    """Encode rows of a `classifier` stage with their own labels."""
    labelled = [row for row in rows if row.get("label") is not None]
    encoded = encode_unlabelled(labelled, tokenizer, encoding)
    for row in rows:
        if row.get("label") is None:
            yield TokenizedRow([], unusable=NO_LABEL)
        else:
            yield replace(next(encoded), labels=[int(row["label"])])


def encode_reward_pairs(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[TokenizedRow]:
    """Encode preference pairs of a `reward` stage as two sequences each: with the chosen, and with the rejected
    response."""
    reasons = [check_pair(row) for row in rows]
    pairs = [row for row, reason in zip(rows, reasons, strict=True) if not reason]
    sides = iter(
        encode_classifier_inputs([side for row in pairs for side in (row, rejected_side(row))], tokenizer, encoding)
    )
    for reason in reasons:
        if reason:
            yield TokenizedRow([], unusable=reason)
            continue
        chosen, rejected = next(sides), next(sides)
        are_equal = (chosen.ids, chosen.token_types) == (rejected.ids, rejected.token_types)
        suffix = " after truncation" if chosen.truncated or rejected.truncated else ""
        reason = SAME_RESPONSES + suffix if are_equal else ""
        yield TokenizedRow([chosen, rejected], unusable=chosen.rejected or rejected.rejected or reason)


def _separates_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer separates the texts of a pair with a special token."""
    return bool(tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False))


def _texts_of(row: Row, as_pair: bool) -> tuple[str, ...]:
    """Return the row as one text, or as a pair of prompt and response if `as_pair` and if it ends with a response."""
    contents = [message["content"] or "" for message in row.get("messages") or ()]
    if not contents:
        return (row.get("text") or "",)
    if not as_pair or len(contents) == 1 or row["messages"][-1]["role"] != "assistant":
        return ("\n\n".join(contents),)
    return "\n\n".join(contents[:-1]), contents[-1]


def _encode_chats(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[Encoded]:
    """Encode conversations by the chat template."""
    if not rows:
        return []
    encoded = encode_untruncated(rows, tokenizer, encoding)
    too_long = [index for index, item in enumerate(encoded) if len(item.ids) > encoding.max_length]
    truncated = encode_responses([rows[index] for index in too_long], tokenizer, encoding)
    for index, item in zip(too_long, truncated, strict=True):
        encoded[index] = item
    has_token_types = "token_type_ids" in tokenizer.model_input_names
    return [replace(item, spans=(), token_types=[0] * len(item.ids) if has_token_types else None) for item in encoded]


def _encode_texts(
    texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[Encoded]:
    """Encode single texts, or pairs of texts; `texts` must not mix both. The tokenizer truncates them, so that their
    special tokens are kept."""
    if not texts:
        return []
    # Truncate at the end, whatever the tokenizer's default is. In a pair, the longer text is truncated first.
    tokenizer.truncation_side = "right"
    columns = [list(column) for column in zip(*texts, strict=True)]
    untruncated = tokenizer(*columns, verbose=False)
    truncated = tokenizer(*columns, truncation=True, max_length=max_length)
    token_types = truncated.get("token_type_ids") or [None] * len(texts)
    return [
        Encoded(ids, (), truncated=len(untruncated_ids) > len(ids), token_types=types)
        for ids, types, untruncated_ids in zip(
            truncated["input_ids"], token_types, untruncated["input_ids"], strict=True
        )
    ]
