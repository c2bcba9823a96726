"""What a classifier or an embedding model sees of a row, and rows as batches of tensors.

    a conversation, where the model's own tokenizer brings a chat template (reward models do): the whole conversation
        as the template renders it, as in training (models/encode.py), without further special tokens; one that is too
        long loses its oldest turns, then the beginning of its prompt
    a conversation, where it brings none (text classifiers): all that comes before the last answer, and that answer, as
        a pair of texts where the tokenizer puts something between the two of a pair ([SEP]), else joined by a blank
        line; a conversation that ends with a question is one text
    a text: as it is, with the tokenizer's special tokens

Batches have an attention mask, because an encoder looks both ways. A model that pools a row's last token finds it by
the padding token, so padding is what the model's config says.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tunery.models.encode import Encoded, Encoding, encode_whole
from tunery.models.encode_preferences import check_pair, encode_responses, rejected_side
from tunery.models.meta_model import position_limit
from tunery.models.tokenized_dataset import TokenizedRow
from tunery.store.rows import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NO_TOKEN = "it has no token"
NO_LABEL = "it has no label"
ALIKE = "both responses have the same tokens"


class ClassifierEncoder:
    """Rows as `model` takes them, cut to `max_length` tokens or to as many as it has positions for."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._config = model.config.get_text_config()
        positions = position_limit(model)
        own = max_length if positions is None else positions.tokens
        self.encoding = Encoding(int(min(max_length, tokenizer.model_max_length, own)), "last_turn", "left")
        self._pad: int | None = self._config.pad_token_id
        takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._typed = takes_types and "token_type_ids" in tokenizer.model_input_names

    def __call__(self, rows: Sequence[Row]) -> list[Encoded]:
        """Of each row what the model is shown."""
        return encode_classifier_inputs(rows, self._tokenizer, self.encoding)

    def tensors(self, batch: Sequence[Encoded], device: str | None = None) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask, (rows, longest) in int64 on the model's device or another, padded on the
        right; token_type_ids where the model was trained with them."""
        import torch

        longest = max(len(item.ids) for item in batch)
        pad = self._pad
        if pad is None:
            # A model that pools then takes the last position of a row and refuses several rows. With padding, it takes
            # the last token that is not the padding's: the same, if that is no row's last.
            last = {item.ids[-1] for item in batch}
            pad = next(token for token in range(len(last) + 1) if token not in last)
            self._config.pad_token_id = pad
        gaps = [longest - len(item.ids) for item in batch]
        inputs = {
            "input_ids": [item.ids + [pad] * gap for item, gap in zip(batch, gaps, strict=True)],
            "attention_mask": [[1] * len(item.ids) + [0] * gap for item, gap in zip(batch, gaps, strict=True)],
        }
        if self._typed:
            inputs["token_type_ids"] = [
                (item.token_types or [0] * len(item.ids)) + [0] * gap for item, gap in zip(batch, gaps, strict=True)
            ]
        return {name: torch.tensor(values, device=device or self._model.device) for name, values in inputs.items()}


# Rows to tokens


def encode_classifier_inputs(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> list[Encoded]:
    """Of each row what a model that reads whole rows is shown, cut to `encoding.max_length`; nothing is trained."""
    by_template = tokenizer.chat_template is not None
    done: dict[int, Encoded] = {}
    chats = [n for n, row in enumerate(rows) if row.get("messages") and by_template]
    done |= zip(chats, _chats([rows[n] for n in chats], tokenizer, encoding), strict=True)
    paired = _separates_pairs(tokenizer)
    plain = {n: _prompt_and_response(row, paired) for n, row in enumerate(rows) if n not in done}
    for count in (1, 2):
        mine = [n for n, texts in plain.items() if len(texts) == count]
        done |= zip(mine, _texts([plain[n] for n in mine], tokenizer, encoding.max_length), strict=True)
    return [done[n] for n in range(len(rows))]


def encode_unlabelled(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[TokenizedRow]:
    """For `classifier` where the stage that gives a row is its label."""
    for item in encode_classifier_inputs(rows, tokenizer, encoding):
        yield TokenizedRow([item], unusable=item.rejected or ("" if item.ids else NO_TOKEN))


def encode_labelled(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[TokenizedRow]:
    """For `classifier`: rows with their own label."""
    labelled = [row for row in rows if row.get("label") is not None]
    found = encode_unlabelled(labelled, tokenizer, encoding)
    for row in rows:
        if row.get("label") is None:
            yield TokenizedRow([], unusable=NO_LABEL)
        else:
            yield replace(next(found), labels=[int(row["label"])])


def encode_reward_pairs(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[TokenizedRow]:
    """For `reward`: two sequences a row, the conversation with the chosen response and with the rejected one."""
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
        same = (chosen.ids, chosen.token_types) == (rejected.ids, rejected.token_types)
        cut = " once they are cut" if chosen.truncated or rejected.truncated else ""
        alike = ALIKE + cut if same else ""
        yield TokenizedRow([chosen, rejected], unusable=chosen.rejected or rejected.rejected or alike)


def _separates_pairs(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer puts a special token between the two texts of a pair."""
    return bool(tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False))


def _prompt_and_response(row: Row, paired: bool) -> tuple[str, ...]:
    """One text, or the two of a pair."""
    turns = [turn["content"] or "" for turn in row.get("messages") or ()]
    if not turns:
        return (row.get("text") or "",)
    if not paired or len(turns) == 1 or row["messages"][-1]["role"] != "assistant":
        return ("\n\n".join(turns),)
    return "\n\n".join(turns[:-1]), turns[-1]


def _chats(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[Encoded]:
    if not rows:
        return []
    encoded = encode_whole(rows, tokenizer, encoding)
    long = [n for n, item in enumerate(encoded) if len(item.ids) > encoding.max_length]
    for n, item in zip(long, encode_responses([rows[n] for n in long], tokenizer, encoding), strict=True):
        encoded[n] = item
    typed = "token_type_ids" in tokenizer.model_input_names
    return [replace(item, spans=(), token_types=[0] * len(item.ids) if typed else None) for item in encoded]


def _texts(texts: Sequence[tuple[str, ...]], tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Encoded]:
    """All single, or all pairs."""
    if not texts:
        return []
    # Of texts the end is cut, whatever the tokenizer would do by itself; pairs lose of the longer text first.
    tokenizer.truncation_side = "right"
    columns = [list(column) for column in zip(*texts, strict=True)]
    whole = tokenizer(*columns, verbose=False)
    # Cut by the tokenizer, which knows which special tokens must stay.
    cut = tokenizer(*columns, truncation=True, max_length=limit)
    types = cut.get("token_type_ids") or [None] * len(texts)
    return [
        Encoded(ids, (), truncated=len(before) > len(ids), token_types=kinds)
        for ids, kinds, before in zip(cut["input_ids"], types, whole["input_ids"], strict=True)
    ]
