"""Truncate rows to training sequences of at most `max_length` tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tunery.models.encode import Encoded, Encoding, TrainOn, encode_untruncated
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_PROMPT_FRACTION = 0.25
"""Fraction of `max_length` that `truncate: left` reserves for the prompt if the response is too long."""


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, train_on: TrainOn = "last_turn"
) -> list[Encoded]:
    """Encode each row as one sequence, truncated at the end to `max_length` tokens."""
    encoded = encode_untruncated(rows, tokenizer, Encoding(max_length, train_on))
    return [cut_right(item, max_length) for item in encoded]


def encode_sequences(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> list[list[Encoded]]:
    """Return the training sequences of each row: one, or several with `truncate: split`. The row is unusable if one is
    `rejected`, or if none has loss tokens."""
    encoded = encode_untruncated(rows, tokenizer, encoding)
    return [
        [item] if len(item.ids) <= encoding.max_length else _truncated(row, item, tokenizer, encoding)
        for row, item in zip(rows, encoded, strict=True)
    ]


def _truncated(row: Row, item: Encoded, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[Encoded]:
    """Truncate a row whose sequence is longer than `max_length`."""
    limit = encoding.max_length
    if item.rejected:
        return [item]
    if encoding.truncate == "drop":
        return [replace(item, ids=[], spans=(), rejected=f"it is longer than max_length ({limit} tokens)")]
    if encoding.truncate == "right":
        return [cut_right(item, limit)]
    if not row.get("messages"):
        if encoding.truncate == "left":
            first = item.ids[:1] if item.ids[0] == tokenizer.bos_token_id else []
            ids = [*first, *item.ids[len(item.ids) - limit + len(first) :]]
            return [replace(item, ids=ids, spans=((0, limit),), truncated=True)]
        chunks = (item.ids[start : start + limit] for start in range(0, len(item.ids), limit))
        # A chunk of a single token has no loss.
        return [replace(item, ids=ids, spans=((0, len(ids)),)) for ids in chunks if len(ids) > 1]
    if encoding.truncate == "split":
        return _split(row, item, tokenizer, encoding)
    sides = without_oldest_turns(
        row, lambda rows: encode_untruncated(rows, tokenizer, encoding), lambda row: [row], limit
    )
    if sides is not None:
        (item,) = sides
        if len(item.ids) <= limit:
            return [replace(item, truncated=True)]
    return [cut_prompt(item, limit, bos_token_id=tokenizer.bos_token_id)]


def cut_right(item: Encoded, limit: int) -> Encoded:
    """Truncate after the last response that fits completely, or within the first one if none fits."""
    if len(item.ids) <= limit:
        return item
    complete = [span for span in item.spans if span[1] <= limit]
    if complete and len(item.spans) > 1:
        return replace(item, ids=item.ids[: complete[-1][1]], spans=tuple(complete), truncated=True)
    spans = tuple((start, min(end, limit)) for start, end in item.spans if start < limit)
    return replace(item, ids=item.ids[:limit], spans=spans, truncated=True)


def cut_prompt(
    item: Encoded, limit: int, num_response_tokens: int | None = None, bos_token_id: int | None = None
) -> Encoded:
    """Truncate the start of the prompt, so that prompt and response (the last span) have `limit` tokens.

    num_response_tokens: number of tokens to leave for the response, if not those of the span; bos_token_id: kept as the
    first token, if it is. The prompt keeps at least a quarter of `limit`, and a longer response is truncated at its
    end. Earlier spans are kept if they are complete.
    """
    response_start, response_end = item.response
    if num_response_tokens is None:
        num_response_tokens = response_end - response_start
    prompt_length = min(response_start, max(limit - num_response_tokens, int(limit * MIN_PROMPT_FRACTION)))
    first = response_start - prompt_length
    ids = item.ids[first:response_end][:limit]
    has_bos = prompt_length > 1 and item.ids[0] == bos_token_id
    if has_bos:
        ids[0] = item.ids[0]
    spans = [(start - first, end - first) for start, end in item.spans[:-1] if start >= first + has_bos]
    if len(ids) > prompt_length:
        spans.append((prompt_length, len(ids)))
    return replace(item, ids=ids, spans=tuple(spans), truncated=True)


def without_oldest_turns(
    row: Row,
    encode_rows: Callable[[Sequence[Row]], list[Encoded]],
    sides_of: Callable[[Row], list[Row]],
    limit: int,
) -> list[Encoded] | None:
    """Encode the sides of a row (one, or both of a preference pair) without its oldest messages. Return None if no
    message can be dropped.

    encode_rows: encodes rows without truncation; sides_of: returns the sides of a row. As few messages as possible are
    dropped so that all sides have at most `limit` tokens, or as many as possible if they never do. System messages are
    kept, and the other messages start with a user message.
    """
    messages = row["messages"]
    system = [message for message in messages if message["role"] == "system"]
    starts = [index for index, message in enumerate(messages) if message["role"] == "user"][1:]

    def sides(start: int) -> list[Encoded]:
        rest = [message for message in messages[start:] if message["role"] != "system"]
        return encode_rows(sides_of({**row, "messages": [*system, *rest]}))

    def usable(encoded: list[Encoded]) -> bool:
        return all(item.spans and not item.rejected for item in encoded)

    # Binary search: fewer messages have fewer tokens.
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        if all(len(item.ids) <= limit for item in sides(starts[middle])):
            high = middle
        else:
            low = middle + 1
    candidates = (*starts[low:], *reversed(starts[:low]))
    return next((encoded for start in candidates if usable(encoded := sides(start))), None)


def _split(row: Row, item: Encoded, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[Encoded]:
    """Split a conversation before user messages into parts with as many messages as possible. Each part starts with the
    system message. A part between two user messages that is still too long is split into windows of tokens."""
    limit, parts = encoding.max_length, []
    messages = row["messages"]
    system = [message for message in messages if message["role"] == "system"]
    rest = [message for message in messages if message["role"] != "system"]
    while rest:
        starts = [index for index, message in enumerate(rest) if message["role"] == "user" and index] + [len(rest)]
        best: tuple[int, Encoded] | None = None
        for end in starts:
            part = {**row, "messages": [*system, *rest[:end]]}
            (encoded,) = encode_untruncated([part], tokenizer, encoding)
            if encoded.rejected:
                return _windows(item, limit)
            if best is not None and len(encoded.ids) > limit:
                break
            best = end, encoded
        assert best is not None, "starts is not empty"
        end, encoded = best
        if end == len(rest) or encoding.train_on == "all_turns":
            parts += [encoded] if len(encoded.ids) <= limit else _windows(encoded, limit)
        rest = rest[end:]
    return [part for part in parts if part.num_loss_tokens] or [cut_right(item, limit)]


def _windows(item: Encoded, limit: int) -> list[Encoded]:
    """Split a sequence into windows of at most `limit` tokens. Together they have each loss token once; up to a quarter
    of a window is context before its loss tokens."""
    parts: list[Encoded] = []
    context, covered_to = int(limit * MIN_PROMPT_FRACTION), 0
    while pending := [max(start, covered_to) for start, end in item.spans if end > covered_to]:
        first = 0 if not parts and pending[0] < limit - 1 else max(0, pending[0] - context)
        stop = first + limit
        spans = tuple(
            (max(start, covered_to) - first, min(end, stop) - first)
            for start, end in item.spans
            if end > covered_to and start < stop
        )
        parts.append(replace(item, ids=item.ids[first:stop], spans=spans, truncated=True))
        covered_to = stop
    return parts
