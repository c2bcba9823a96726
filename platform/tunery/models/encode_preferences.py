"""Preference pairs and rated responses as sequences: a prompt and one response, of which only the response counts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tunery.models.encode import Encoded, Encoding, encode_whole
from tunery.models.tokenized_dataset import TokenizedRow
from tunery.models.truncation import cut_prompt, cut_right, without_oldest_turns
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def rejected_side(row: Row) -> Row:
    """A preference pair's conversation with the rejected response in place of the chosen one."""
    return {**row, "messages": [*row["messages"][:-1], *row["rejected"]]}


def check_pair(row: Row) -> str:
    """Why the row is no preference pair; "" where it is one."""
    chosen, rejected = row.get("messages"), row.get("rejected")
    if not chosen or not rejected:
        return "it is no preference pair"
    return "a response is empty" if _is_empty(chosen[-1:]) or _is_empty(rejected) else ""


def _is_empty(turns: Sequence[dict[str, Any]]) -> bool:
    return not any((turn["content"] or "").strip() or turn.get("tool_calls") for turn in turns)


def encode_pairs(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> Iterator[TokenizedRow]:
    """Two sequences a row, chosen and rejected, after the same prompt."""
    pairs = [row for row in rows if row.get("messages") and row.get("rejected")]
    found = iter(_encode_sides(pairs, tokenizer, encoding))
    for row in rows:
        if not (row.get("messages") and row.get("rejected")):
            yield TokenizedRow([], unusable="it is no preference pair")
            continue
        chosen, rejected = next(found)
        reason = _unusable(chosen) or _unusable(rejected)
        if not reason and chosen.ids == rejected.ids:
            reason = "both responses are the same" + (
                " once they are cut" if chosen.truncated or rejected.truncated else ""
            )
        yield TokenizedRow([chosen, rejected], unusable=reason)


def encode_rated(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> Iterator[TokenizedRow]:
    """A rated row gives one sequence with its label, a preference pair a wanted and an unwanted one."""
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
            yield TokenizedRow([], unusable="it has no rating")


def _unusable(item: Encoded) -> str:
    return item.rejected or ("" if item.num_loss_tokens else "no response is left to train on")


def _encode_sides(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> list[tuple[Encoded, Encoded]]:
    whole = encode_whole_responses([*rows, *map(rejected_side, rows)], tokenizer, encoding)
    found = []
    for row, chosen, rejected in zip(rows, whole[: len(rows)], whole[len(rows) :], strict=True):
        one, other = _fitted(row, (chosen, rejected), tokenizer, encoding)
        found.append((one, other))
    return found


def encode_responses(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[Encoded]:
    """A sequence a row, of which the last turn counts."""
    whole = encode_whole_responses(rows, tokenizer, encoding)
    return [_fitted(row, (item,), tokenizer, encoding)[0] for row, item in zip(rows, whole, strict=True)]


def encode_whole_responses(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> list[Encoded]:
    """One sequence a row, whatever its length, up to the end of the response: a template may put text behind its end
    token."""
    encoded = encode_whole(rows, tokenizer, replace(encoding, train_on="last_turn"))
    return [replace(item, ids=item.ids[: item.response[1]]) if item.spans else item for item in encoded]


def _fitted(
    row: Row, sides: Sequence[Encoded], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> tuple[Encoded, ...]:
    """All sides of a row within `max_length`, after the same prompt."""
    limit = encoding.max_length
    if all(len(item.ids) <= limit for item in sides) or any(item.rejected for item in sides):
        return tuple(sides)
    if encoding.truncate == "drop":
        return tuple(
            replace(item, ids=[], spans=(), rejected=f"it is longer than max_length ({limit} tokens)") for item in sides
        )
    if encoding.truncate == "right":
        return tuple(cut_right(item, limit) for item in sides)
    shorter = without_oldest_turns(
        row,
        lambda rows: encode_whole_responses(rows, tokenizer, encoding),
        lambda row: [row] if len(sides) == 1 else [row, rejected_side(row)],
        limit,
    )
    if shorter is not None:
        sides = [replace(item, truncated=True) for item in shorter]
        if all(len(item.ids) <= limit for item in sides):
            return tuple(sides)
    response = max(item.response[1] - item.response[0] for item in sides)
    return tuple(cut_prompt(item, limit, response, tokenizer.bos_token_id) for item in sides)
