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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tunery.models.encode import Encoding, encode_whole
from tunery.models.encode_preferences import encode_responses
from tunery.models.outline import position_limit
from tunery.store.rows import Row

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Seen:
    """A row's tokens, and which of the two texts of a pair each belongs to."""

    ids: list[int]
    types: list[int]
    truncated: bool
    rejected: str = ""
    """Why the chat template can't render the row; then there are no tokens."""


class RowReader:
    """Rows as `model` takes them, cut to `max_length` tokens or to as many as it has positions for."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._config = model.config.get_text_config()
        positions = position_limit(model)
        own = max_length if positions is None else positions.tokens
        self._limit = int(min(max_length, tokenizer.model_max_length, own))
        self._pad: int | None = self._config.pad_token_id
        self._pairs = tokenizer.num_special_tokens_to_add(pair=True) > tokenizer.num_special_tokens_to_add(pair=False)
        takes_types = "token_type_ids" in inspect.signature(model.forward).parameters
        self._typed = takes_types and "token_type_ids" in tokenizer.model_input_names
        # Of texts the end is cut, whatever the tokenizer would do by itself; pairs lose of the longer text first.
        tokenizer.truncation_side = "right"

    def tensors(self, batch: Sequence[Seen], device: str | None = None) -> dict[str, torch.Tensor]:
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
            inputs["token_type_ids"] = [item.types + [0] * gap for item, gap in zip(batch, gaps, strict=True)]
        return {name: torch.tensor(values, device=device or self._model.device) for name, values in inputs.items()}

    def __call__(self, rows: Sequence[Row]) -> list[Seen]:
        """Of each row what the model is shown."""
        by_template = self._tokenizer.chat_template is not None
        done: dict[int, Seen] = {}
        chats = [n for n, row in enumerate(rows) if row.get("messages") and by_template]
        done |= zip(chats, self._chats([rows[n] for n in chats]), strict=True)
        plain = {n: self._question_and_answer(row) for n, row in enumerate(rows) if n not in done}
        for paired in (False, True):
            mine = [n for n, texts in plain.items() if (len(texts) == 2) == paired]
            done |= zip(mine, self._texts([plain[n] for n in mine]), strict=True)
        return [done[n] for n in range(len(rows))]

    def _question_and_answer(self, row: Row) -> tuple[str, ...]:
        """One text, or the two of a pair."""
        turns = [turn["content"] or "" for turn in row.get("messages") or ()]
        if not turns:
            return (row.get("text") or "",)
        if not self._pairs or len(turns) == 1 or row["messages"][-1]["role"] != "assistant":
            return ("\n\n".join(turns),)
        return "\n\n".join(turns[:-1]), turns[-1]

    def _chats(self, rows: Sequence[Row]) -> list[Seen]:
        if not rows:
            return []
        encoding = Encoding(self._limit, "last_turn", truncate="left")
        encoded = encode_whole(rows, self._tokenizer, encoding)
        long = [n for n, item in enumerate(encoded) if len(item.ids) > self._limit]
        for n, item in zip(long, encode_responses([rows[n] for n in long], self._tokenizer, encoding), strict=True):
            encoded[n] = item
        return [Seen(item.ids, [0] * len(item.ids), item.truncated, item.rejected) for item in encoded]

    def _texts(self, texts: Sequence[tuple[str, ...]]) -> list[Seen]:
        """All single, or all pairs."""
        if not texts:
            return []
        columns = [list(column) for column in zip(*texts, strict=True)]
        whole = self._tokenizer(*columns, verbose=False)
        # Cut by the tokenizer, which knows which special tokens must stay.
        cut = self._tokenizer(*columns, truncation=True, max_length=self._limit)
        types = cut.get("token_type_ids") or [[0] * len(ids) for ids in cut["input_ids"]]
        return [
            Seen(ids, kinds, len(before) > len(ids))
            for ids, kinds, before in zip(cut["input_ids"], types, whole["input_ids"], strict=True)
        ]
