"""Encode preference pairs and rated responses as sequences of a prompt and one response, with a loss on the
response."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tunery.models.encode import Encoded, Encoding, encode_untruncated
from tunery.models.encode_rows import TokenizedRow
from tunery.models.truncation import cut_prompt, cut_right, without_oldest_turns
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rejected_side(row: Row) -> Row:
    """Return the conversation of a preference pair with the rejected response instead of the chosen one."""
    return {**row, "messages": [*row["messages"][:-1], *row["rejected"]]}


def check_pair(row: Row) -> str:
    """Return why the row is not a usable preference pair; "" if it is."""
    chosen, rejected = row.get("messages"), row.get("rejected")
    if not chosen or not rejected:
        return "it is not a preference pair"
    return "a response is empty" if _is_empty(chosen[-1:]) or _is_empty(rejected) else ""


def _is_empty(messages: Sequence[dict[str, Any]]) -> bool:
    return not any((message["content"] or "").strip() or message.get("tool_calls") for message in messages)


def encode_pairs(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> Iterator[TokenizedRow]:
    """Encode each preference pair as two sequences with the same prompt: chosen and rejected."""
    pairs = [row for row in rows if row.get("messages") and row.get("rejected")]
    encoded = iter(_encode_sides(pairs, tokenizer, encoding))
    for row in rows:
        if not (row.get("messages") and row.get("rejected")):
            yield TokenizedRow([], unusable="it is not a preference pair")
            continue
        chosen, rejected = next(encoded)
        reason = _unusable(chosen) or _unusable(rejected)
        if not reason and chosen.ids == rejected.ids:
            reason = "both responses are the same" + (
                " after truncation" if chosen.truncated or rejected.truncated else ""
            )
        yield TokenizedRow([chosen, rejected], unusable=reason)


def encode_rated(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> Iterator[TokenizedRow]:
    """Encode a rated response as one sequence with its label, and a preference pair as one sequence with label 1 and
    one with label 0."""
    pairs = [row for row in rows if row.get("messages") and row.get("rejected")]
    rated = [row for row in rows if row.get("messages") and not row.get("rejected") and row.get("label") is not None]
    sides = iter(_encode_sides(pairs, tokenizer, encoding))
    single = iter(encode_responses(rated, tokenizer, encoding))
    for row in rows:
        if row.get("messages") and row.get("rejected"):
            usable = [(item, label) for item, label in zip(next(sides), (1, 0), strict=True) if not _unusable(item)]
            reason = "" if usable else "no response is left to train on"
            yield TokenizedRow([item for item, _ in usable], [label for _, label in usable], reason)
        elif row.get("messages") and row.get("label") is not None:
            item = next(single)
            yield TokenizedRow([item], [int(row["label"])], _unusable(item))
        else:
            yield TokenizedRow([], unusable="it has no label")


def _unusable(item: Encoded) -> str:
    """Return why a sequence can't be trained on; "" if it can."""
    return item.rejected or ("" if item.num_loss_tokens else "no response is left to train on")


def _encode_sides(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> list[tuple[Encoded, Encoded]]:
    """Encode preference pairs: (chosen, rejected) of each row."""
    sequences = encode_untruncated_responses([*rows, *map(rejected_side, rows)], tokenizer, encoding)
    sides = []
    for row, chosen, rejected in zip(rows, sequences[: len(rows)], sequences[len(rows) :], strict=True):
        chosen, rejected = _truncated(row, (chosen, rejected), tokenizer, encoding)
        sides.append((chosen, rejected))
    return sides


def encode_responses(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[Encoded]:
    """Encode each row as one sequence with a loss on its last message, truncated to `encoding.max_length`."""
    sequences = encode_untruncated_responses(rows, tokenizer, encoding)
    return [_truncated(row, (item,), tokenizer, encoding)[0] for row, item in zip(rows, sequences, strict=True)]


def encode_untruncated_responses(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> list[Encoded]:
    """The same without truncation. Sequences end with the response; text that the template adds after its EOS token is
    removed."""
    encoded = encode_untruncated(rows, tokenizer, replace(encoding, train_on="last_turn"))
    return [replace(item, ids=item.ids[: item.response[1]]) if item.spans else item for item in encoded]


def _truncated(
    row: Row, sides: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> tuple[Encoded, ...]:
    """Truncate all sides of a row (one, or both of a preference pair) to `max_length`, to the same prompt."""
    limit = encoding.max_length
    if all(len(item.ids) <= limit for item in sides) or any(item.rejected for item in sides):
        return tuple(sides)
    if encoding.truncate == "drop":
        reason = f"it is longer than max_length ({limit} tokens)"
        return tuple(replace(item, ids=[], spans=(), rejected=reason) for item in sides)
    if encoding.truncate == "right":
        return tuple(cut_right(item, limit) for item in sides)
    shorter = without_oldest_turns(
        row,
        lambda rows: encode_untruncated_responses(rows, tokenizer, encoding),
        lambda row: [row] if len(sides) == 1 else [row, rejected_side(row)],
        limit,
    )
    if shorter is not None:
        sides = [replace(item, truncated=True) for item in shorter]
        if all(len(item.ids) <= limit for item in sides):
            return tuple(sides)
    num_response_tokens = max(item.response[1] - item.response[0] for item in sides)
    return tuple(cut_prompt(item, limit, num_response_tokens, tokenizer.bos_token_id) for item in sides)
