"""Preview of rows as model inputs: the token sequences of a training, scoring or evaluation stage as text, with the
kind of each token: trained, masked, special, or truncated (models/preview_sequences.py).

`preview_rows` encodes rows with the same functions as the stages (models/encode.py, models/classifier_inputs.py).
`tunery preview` prints the result; a training logs `preview_records` of its first rows, which the report shows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from tunery.models.chat_template import chat_template_of
from tunery.models.classifier_inputs import NO_TOKEN, ClassifierEncoder, encode_classifier_inputs, encode_reward_pairs
from tunery.models.encode import NO_LIMIT, Encoded, Encoding, encode_untruncated
from tunery.models.encode_preferences import (
    encode_pairs,
    encode_rated,
    encode_responses,
    encode_untruncated_responses,
    rejected_side,
)
from tunery.models.encode_rows import InputFormat
from tunery.models.preview_sequences import PreviewRow, PreviewSequence, TokenGroup, token_groups
from tunery.models.preview_truncation import (
    Untruncated,
    cut_positions,
    kept_indices,
    kept_of_text,
    untruncated,
    with_cuts,
)
from tunery.models.prompts import TOO_LONG, encode_prompt_rows
from tunery.models.row_encodings import encoding_of, row_encoding_of
from tunery.models.truncation import encode_sequences
from tunery.store.rows import CONTENT, Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

COLUMNS = [*CONTENT, "id", "rejected", "label", "source", "line"]
"""Columns of a row that a preview reads."""
ROWS = 3
"""Default number of rows per stage that are logged and printed."""
MAX_RECORD_TOKENS = 2_000
"""Maximum tokens of a sequence in a record; the middle of a longer sequence is omitted."""


def preview_records(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    count: int = ROWS,
    *,
    input_format: InputFormat = "conversation",
    model: PreTrainedModel | None = None,
) -> list[dict[str, Any]]:
    """Return records of the first `count` rows for the event `preview`. Raises UnsupportedTemplate, like the training
    itself."""
    first = list(islice(rows, count))
    shown = preview_rows(first, tokenizer, encoding, input_format, model=model, max_tokens=MAX_RECORD_TOKENS)
    return [row.as_record(MAX_RECORD_TOKENS) for row in shown]


def stage_preview(
    stage: Any, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
) -> dict[str, Any]:
    """Return the event `preview` of a training: {template, records}. `rows` have the columns COLUMNS; `model` is
    required only by trainings of classifiers and reward models. Raises UnsupportedTemplate."""
    first = list(islice(rows, ROWS))
    input_format, encoding = training_input(stage)
    records = preview_records(first, tokenizer, encoding, input_format=input_format, model=model)
    chats = tokenizer.chat_template is not None and any(row.get("messages") for row in first)
    return {"template": template_summary(tokenizer) if chats else "", "records": records}


def training_input(stage: Any) -> tuple[InputFormat, Encoding]:
    """Return format and encoding of the rows that a training reads, for a preview."""
    row_encoding = row_encoding_of(stage)
    assert row_encoding is not None, "every training encodes its rows"
    encoding = Encoding(stage.max_length) if row_encoding.in_blocks else encoding_of(stage)
    return row_encoding.input_format, encoding


def preview_rows(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
    input_format: InputFormat,
    *,
    model: PreTrainedModel | None = None,
    skip: int = 0,
    max_tokens: int | None = None,
) -> list[PreviewRow]:
    """Return the sequences of each row.

    `model`: required by the formats `classifier` and `reward_pair`, with or without weights; its config limits the
    length of a row. `skip`: number of rows without a preview, which only determine where blocks of documents begin.
    `max_tokens`: the middle of a longer document is not decoded. Raises UnsupportedTemplate if the rows contain
    conversations and the chat template can't be used.
    """
    if input_format == "documents":
        return _documents(rows, tokenizer, encoding.max_length, skip, max_tokens)
    rows = rows[skip:]
    if input_format in ("classifier", "reward_pair"):
        assert model is not None, "these formats need a model"
        read = ClassifierEncoder(model, tokenizer, encoding.max_length)
        show = _reward_pair if input_format == "reward_pair" else _classified
        return [show(row, read, tokenizer, encoding.max_length) for row in rows]
    make: dict[str, Callable[[Row, PreTrainedTokenizerBase, Encoding], PreviewRow]] = {
        "conversation": _conversation,
        "pair": _pair,
        "rated": _rated,
        "prompt": _prompt,
        "scored": _scored,
        "all_tokens": _all_tokens,
        "ifd": _ifd,
    }
    return [make[input_format](row, tokenizer, encoding) for row in rows]


# Rows to sequences, by format


def _row(row: Row, sequences: Sequence[PreviewSequence], reason: str = "") -> PreviewRow:
    return PreviewRow(row.get("id") or "", row.get("source") or "", row.get("line") or 0, tuple(sequences), reason)


def _documents(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, block: int, skip: int, max_tokens: int | None
) -> list[PreviewRow]:
    """Preview each row's part of the blocks. The first token of a block has no loss, since nothing predicts it."""
    encoded = encode_untruncated(rows, tokenizer, Encoding(NO_LIMIT, "all_tokens")) if rows else []
    start = sum(len(item.ids) for item in encoded[:skip])
    found = []
    for row, item in zip(rows[skip:], encoded[skip:], strict=True):
        first = -start % block
        begins = range(first, len(item.ids), block)
        trained = frozenset(range(len(item.ids))) - frozenset(begins)
        marks = tuple((index, f"block {(start + index) // block + 1} begins") for index in begins)
        one = _sequence("", item, tokenizer, block, frozenset(begins), max_tokens)
        found.append(_row(row, [replace(one, has_loss=bool(item.ids), trained=trained, blocks=True, marks=marks)]))
        start += len(item.ids)
    return found


def _conversation(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> PreviewRow:
    (parts,) = encode_sequences([row], tokenizer, encoding)
    if len(parts) == 1:
        return _row(row, [_with_loss("", row, parts[0], tokenizer, encoding)])
    labels = [f"part {number} of {len(parts)}" for number in range(1, len(parts) + 1)]
    # The parts complement each other, so none of them is previewed with cuts.
    return _row(row, [_sequence(*part, tokenizer, encoding.max_length) for part in zip(labels, parts, strict=True)])


def _pair(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> PreviewRow:
    (found,) = encode_pairs([row], tokenizer, encoding)
    if not found.sequences:
        return _row(row, [], found.unusable)
    sides = [
        (label, side, item)
        for side, (label, item) in enumerate(zip(("chosen", "rejected"), found.sequences, strict=True))
    ]
    shown = _responses(row, sides, tokenizer, encoding)
    return _row(row, shown, "" if any(one.reason for one in shown) else found.unusable)


def _rated(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> PreviewRow:
    (found,) = encode_rated([row], tokenizer, encoding)
    sides = [
        ("desirable" if label else "undesirable", 1 if row.get("rejected") and not label else 0, item)
        for label, item in zip(found.labels, found.sequences, strict=True)
    ]
    shown = _responses(row, sides, tokenizer, encoding)
    return _row(row, shown, "" if any(one.reason for one in shown) else found.unusable)


def _prompt(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> PreviewRow:
    (found,) = encode_prompt_rows([row], tokenizer, encoding)
    if not found.sequences:
        return _row(row, [], found.unusable)
    (item,) = found.sequences
    one = _sequence("", item, tokenizer, encoding.max_length)
    if found.unusable == TOO_LONG:
        reason = f"its prompt has {len(item.ids):,} tokens, and max_length allows {encoding.max_length:,}"
        one = replace(one, reason=reason)
    return _row(row, [replace(one, marks=((len(item.ids), "generation begins here"),) if item.ids else ())])


def _scored(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> PreviewRow:
    return _row(row, [_with_loss("", row, _encoded(row, tokenizer, encoding), tokenizer, encoding)])


def _all_tokens(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> PreviewRow:
    item = _encoded(row, tokenizer, encoding)
    item = replace(item, spans=((0, len(item.ids)),) if item.ids else ())
    return _row(row, [_with_loss("", row, item, tokenizer, encoding)])


def _ifd(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> PreviewRow:
    item = _encoded(row, tokenizer, encoding)
    after_prompt = _with_loss("after the prompt", row, item, tokenizer, encoding)
    start, end = item.response
    if not item.generation_prompt_ids or start == end:
        return _row(row, [replace(after_prompt, reason=after_prompt.reason or "there is no response to compare")])
    ids = [*item.generation_prompt_ids, *item.ids[start:end]]
    alone = Encoded(ids, ((len(item.generation_prompt_ids), len(ids)),))
    return _row(row, [after_prompt, _sequence("without the prompt", alone, tokenizer, encoding.max_length)])


def _classified(row: Row, read: ClassifierEncoder, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PreviewRow:
    return _row(row, [_classifier_sequence("", row, read([row])[0], read, tokenizer, max_length)])


def _reward_pair(row: Row, read: ClassifierEncoder, tokenizer: PreTrainedTokenizerBase, max_length: int) -> PreviewRow:
    (found,) = encode_reward_pairs([row], tokenizer, read.encoding)
    if not found.sequences:
        return _row(row, [], found.unusable)
    chosen, rejected = found.sequences
    sides = [
        _classifier_sequence("chosen", row, chosen, read, tokenizer, max_length),
        _classifier_sequence("rejected", rejected_side(row), rejected, read, tokenizer, max_length),
    ]
    return _row(row, sides, "" if any(side.reason for side in sides) else found.unusable)


# Sequences


def _encoded(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> Encoded:
    (parts,) = encode_sequences([row], tokenizer, encoding)
    return parts[0]


def _responses(
    row: Row,
    items: Sequence[tuple[str, int, Encoded]],
    tokenizer: PreTrainedTokenizerBase,
    encoding: Encoding,
) -> list[PreviewSequence]:
    """Preview the responses of a row. `items`: (label, index of the side, sequence). All sides of a row are truncated
    to the same prompt."""
    sources: list[Untruncated] = []
    if any(_may_be_cut(item, encoding) for _, _, item in items):
        sources = untruncated(
            row,
            lambda rows: encode_untruncated_responses(rows, tokenizer, encoding),
            lambda row: [row, rejected_side(row)] if row.get("rejected") else [row],
            tokenizer,
            encoding,
        )
    return [
        _with_loss_and_cuts(label, item, sources[side] if sources else None, tokenizer, encoding)
        for label, side, item in items
    ]


def _with_loss(
    label: str, row: Row, item: Encoded, tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> PreviewSequence:
    source = None
    if _may_be_cut(item, encoding):
        (source,) = untruncated(
            row, lambda rows: encode_untruncated(rows, tokenizer, encoding), lambda row: [row], tokenizer, encoding
        )
    return _with_loss_and_cuts(label, item, source, tokenizer, encoding)


def _may_be_cut(item: Encoded, encoding: Encoding) -> bool:
    """Whether tokens may be missing. `split` drops messages without a loss and does not count that as truncation."""
    return item.truncated or encoding.truncate == "split" or (encoding.truncate == "drop" and not item.ids)


def _with_loss_and_cuts(
    label: str, item: Encoded, source: Untruncated | None, tokenizer: PreTrainedTokenizerBase, encoding: Encoding
) -> PreviewSequence:
    if source is None:
        one = _sequence(label, item, tokenizer, encoding.max_length)
    else:
        kept = kept_indices(item, source, encoding.truncate, tokenizer)
        one = _with_kept(label, item, source.whole.ids, kept, tokenizer, encoding.max_length)
    if not item.num_loss_tokens and not one.reason:
        one = replace(one, reason="no response is left to train on: it is empty, masked, or cut off")
    return one


def _with_kept(
    label: str,
    item: Encoded,
    whole: Sequence[int],
    kept: Sequence[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> PreviewSequence:
    """Preview a sequence with its cuts. `kept`: index in `whole` of each token of `item`; None if unknown."""
    positions = None if kept is None else cut_positions(kept, len(whole))
    edges = frozenset(index for index, _, _ in positions or ())
    return with_cuts(_sequence(label, item, tokenizer, max_length, edges), whole, positions, tokenizer)


def _sequence(
    label: str,
    item: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    edges: frozenset[int] = frozenset(),
    max_tokens: int | None = None,
) -> PreviewSequence:
    edges |= {edge for span in item.spans for edge in span}
    notes = []
    if item.dropped_reasoning:
        turns = (
            "an assistant message" if item.dropped_reasoning == 1 else f"{item.dropped_reasoning} assistant messages"
        )
        notes.append(f"the chat template drops the reasoning of {turns}")
    if item.escaped_tokens:
        own = "a special token" if item.escaped_tokens == 1 else f"{item.escaped_tokens} special tokens"
        notes.append(f"{own} in the row's own text is encoded as ordinary text")
    head, rest = len(item.ids), len(item.ids)
    if max_tokens is not None and len(item.ids) > max_tokens:
        head = max_tokens * 3 // 4
        rest -= max_tokens - head
    groups = list(token_groups(item.ids, tokenizer, edges, 0, head))
    if head < rest:
        groups.append(TokenGroup(tuple(item.ids[head:rest]), "", False, omitted=True))
        groups += token_groups(item.ids, tokenizer, edges, rest)
    return PreviewSequence(
        label,
        tuple(item.ids),
        tuple(groups),
        bool(item.spans),
        frozenset(item.loss_indices),
        max_length,
        truncated=item.truncated,
        reason=item.rejected,
        notes=tuple(notes),
    )


def _classifier_sequence(
    label: str, row: Row, item: Encoded, read: ClassifierEncoder, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreviewSequence:
    encoding = read.encoding
    (whole,) = encode_classifier_inputs([row], tokenizer, replace(encoding, max_length=NO_LIMIT))
    if not item.ids or len(item.ids) == len(whole.ids):
        one = _sequence(label, item, tokenizer, max_length)
        return one if item.ids or item.rejected else replace(one, reason=NO_TOKEN)
    if row.get("messages") and tokenizer.chat_template is not None:
        # Encode the row again to get the span of the response; the tokens are the same.
        (with_span,) = encode_responses([row], tokenizer, encoding)
        (source,) = untruncated(
            row,
            lambda rows: encode_untruncated_responses(rows, tokenizer, encoding),
            lambda row: [row],
            tokenizer,
            encoding,
        )
        kept = kept_indices(with_span, source, encoding.truncate, tokenizer)
    else:
        kept = kept_of_text(whole.ids, item.ids)
    return _with_kept(label, item, whole.ids, kept, tokenizer, max_length)


# Summaries of the text and tokens around rows


def template_summary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe the behaviour of the chat template in one sentence. Raises UnsupportedTemplate."""
    profile = chat_template_of(tokenizer).profile
    calls = "not rendered"
    if profile.tool_calls:
        parts = [("results", profile.tool_results), ("definitions of tools", profile.tools)]
        with_ = [name for name, rendered in parts if rendered]
        without = [name for name, rendered in parts if not rendered]
        calls = "rendered" + (f" with {' and '.join(with_)}" if with_ else "")
        calls += f", without {' and '.join(without)}" if without else ""
    if profile.reasoning:
        thinking = "rendered" if profile.earlier_reasoning else "rendered in the last message only"
    else:
        thinking = "dropped from responses before the last" if profile.thinking_model else "not rendered"
    said = [
        f"a response ends with {' or '.join(profile.end_tokens) or 'no token'}"
        + (f" ({profile.appended_end} is added after the last message)" if profile.appended_end else ""),
        f"generation begins after {profile.generation_prompt!r}" if profile.generation_prompt else "",
        f"system messages are {'rendered' if profile.system else 'not supported'}",
        "" if profile.multi_turn else "only one prompt with one response is supported",
        f"tool calls are {calls}",
        f"reasoning is {thinking}",
    ]
    return "; ".join(part for part in said if part)


def text_summary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe the special tokens around a text in one sentence."""
    adds_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    begin = f"begins with {tokenizer.bos_token}" if adds_bos else "has no token before it"
    end = f"ends with {tokenizer.eos_token}" if tokenizer.eos_token is not None else "has no end token"
    return f"a text {begin} and {end}"
