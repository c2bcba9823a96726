"""Training sequences of at most `max_length` tokens: what is cut of longer rows, and where."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from tunery.models.encode import Encoded, Encoding, TrainOn, encode_whole
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MIN_PROMPT_FRACTION = 0.25
"""Share of `max_length` that `truncate: left` leaves to a prompt beside a response that is too long."""


def encode(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int, train_on: TrainOn = "last_turn"
) -> list[Encoded]:
    """One sequence for each row, cut at the end to `max_length` tokens."""
    encoded = encode_whole(rows, tokenizer, Encoding(max_length, train_on))
    return [cut_right(item, max_length) for item in encoded]


def encode_sequences(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> list[list[Encoded]]:
    """The training sequences of each row: one, or several where `truncate: split` cuts it. One that is `rejected` or
    has no loss tokens says that the row can't be used."""
    whole = encode_whole(rows, tokenizer, encoding)
    return [
        [item] if len(item.ids) <= encoding.max_length else _truncated(row, item, tokenizer, encoding)
        for row, item in zip(rows, whole, strict=True)
    ]


def _truncated(row: Row, item: Encoded, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[Encoded]:
    """Of a row whose sequence is longer than `max_length`."""
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
        cuts = (item.ids[start : start + limit] for start in range(0, len(item.ids), limit))
        # A last token alone has nothing to be predicted from.
        return [replace(item, ids=ids, spans=((0, len(ids)),)) for ids in cuts if len(ids) > 1]
    if encoding.truncate == "split":
        return _split(row, item, tokenizer, encoding)
    sides = without_oldest_turns(row, lambda rows: encode_whole(rows, tokenizer, encoding), lambda row: [row], limit)
    if sides is not None:
        (item,) = sides
        if len(item.ids) <= limit:
            return [replace(item, truncated=True)]
    return [cut_prompt(item, limit, bos=tokenizer.bos_token_id)]


def cut_right(item: Encoded, limit: int) -> Encoded:
    """After the last response that fits whole; within the first where none does."""
    if len(item.ids) <= limit:
        return item
    whole = [span for span in item.spans if span[1] <= limit]
    if whole and len(item.spans) > 1:
        return replace(item, ids=item.ids[: whole[-1][1]], spans=tuple(whole), truncated=True)
    spans = tuple((start, min(end, limit)) for start, end in item.spans if start < limit)
    return replace(item, ids=item.ids[:limit], spans=spans, truncated=True)


def cut_prompt(item: Encoded, limit: int, response: int | None = None, bos: int | None = None) -> Encoded:
    """Cut the beginning of what precedes the last span (its first token stays, where that is `bos`), so that prompt
    and `response` tokens (the span's own, when not given) are `limit`. The prompt keeps a quarter of `limit`; a
    response that is longer than the rest loses its end. Earlier spans count where they are left whole."""
    start, end = item.response
    response = end - start if response is None else response
    prompt = min(start, max(limit - response, int(limit * MIN_PROMPT_FRACTION)))
    first = start - prompt
    ids = item.ids[first:end][:limit]
    has_bos = prompt > 1 and item.ids[0] == bos
    if has_bos:
        ids[0] = item.ids[0]
    spans = [(begin - first, stop - first) for begin, stop in item.spans[:-1] if begin >= first + has_bos]
    if len(ids) > prompt:
        spans.append((prompt, len(ids)))
    return replace(item, ids=ids, spans=tuple(spans), truncated=True)


def without_oldest_turns(
    row: Row,
    encode_rows: Callable[[Sequence[Row]], list[Encoded]],
    sides_of: Callable[[Row], list[Row]],
    limit: int,
) -> list[Encoded] | None:
    """The sides of the row (one, or both of a preference pair) without its oldest turns: as few as make all sides fit
    `limit`, or all that can go where they never fit. System turns stay, and what remains begins with a user turn. None
    where no turn can go."""
    turns = row["messages"]
    system = [turn for turn in turns if turn["role"] == "system"]
    starts = [index for index, turn in enumerate(turns) if turn["role"] == "user"][1:]

    def sides(start: int) -> list[Encoded]:
        rest = [turn for turn in turns[start:] if turn["role"] != "system"]
        return encode_rows(sides_of({**row, "messages": [*system, *rest]}))

    def usable(found: list[Encoded]) -> bool:
        return all(item.spans and not item.rejected for item in found)

    # The fewer turns, the shorter.
    low, high = 0, len(starts)
    while low < high:
        middle = (low + high) // 2
        if all(len(item.ids) <= limit for item in sides(starts[middle])):
            high = middle
        else:
            low = middle + 1
    candidates = (*starts[low:], *reversed(starts[:low]))
    return next((found for start in candidates if usable(found := sides(start))), None)


def _split(row: Row, item: Encoded, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[Encoded]:
    """As many turns as fit, from one user turn to the next, then those that follow, after the system turn again. What
    is too long between two user turns is cut by tokens."""
    limit, parts = encoding.max_length, []
    turns = row["messages"]
    system = [turn for turn in turns if turn["role"] == "system"]
    rest = [turn for turn in turns if turn["role"] != "system"]
    while rest:
        starts = [index for index, turn in enumerate(rest) if turn["role"] == "user" and index] + [len(rest)]
        best: tuple[int, Encoded] | None = None
        for end in starts:
            part = {**row, "messages": [*system, *rest[:end]]}
            (found,) = encode_whole([part], tokenizer, encoding)
            if found.rejected:
                return _windows(item, limit)
            if best is not None and len(found.ids) > limit:
                break
            best = end, found
        assert best is not None, "starts is not empty"
        end, found = best
        if end == len(rest) or encoding.train_on == "all_turns":
            parts += [found] if len(found.ids) <= limit else _windows(found, limit)
        rest = rest[end:]
    return [part for part in parts if part.num_loss_tokens] or [cut_right(item, limit)]


def _windows(item: Encoded, limit: int) -> list[Encoded]:
    """Every trained token in one window of at most `limit` tokens, after a quarter of `limit` of what precedes it."""
    parts: list[Encoded] = []
    context, trained_to = int(limit * MIN_PROMPT_FRACTION), 0
    while pending := [max(start, trained_to) for start, end in item.spans if end > trained_to]:
        first = 0 if not parts and pending[0] < limit - 1 else max(0, pending[0] - context)
        stop = first + limit
        spans = tuple(
            (max(start, trained_to) - first, min(end, stop) - first)
            for start, end in item.spans
            if end > trained_to and start < stop
        )
        parts.append(replace(item, ids=item.ids[first:stop], spans=spans, truncated=True))
        trained_to = stop
    return parts
