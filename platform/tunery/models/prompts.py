"""Encode prompts for stages that generate responses: PPO, GRPO, RLOO and `win_rate`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from tunery.models.encode import Encoding, as_prompt, encode_prompts
from tunery.models.encode_rows import TokenizedRow
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("id", "text", "messages", "tools")
"""Columns of a row that are read."""
TOO_LONG = "the prompt is too long to leave tokens for a response"
"""Reason of an unusable row. Prompts are not truncated, since a truncated question is useless."""
NO_PROMPT = "it has no prompt"
"""Reason of an unusable row: a text, or a conversation with an assistant message only."""


def encode_prompt_rows(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> Iterator[TokenizedRow]:
    """Encode the prompt of each row, up to the start of its response. Prompts of more than `encoding.max_length` tokens
    are unusable."""
    prompts = [as_prompt(row) for row in rows]
    encoded = iter(encode_prompts([prompt for prompt in prompts if prompt["messages"]], tokenizer))
    for prompt in prompts:
        if not prompt["messages"]:
            yield TokenizedRow([], unusable=NO_PROMPT)
            continue
        item = next(encoded)
        too_long = TOO_LONG if len(item.ids) > encoding.max_length else ""
        yield TokenizedRow([item], unusable=item.rejected or too_long)
