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
    """Return records of the first `count` rows for the event `preview`. Raises UnsupportedTemplate as `preview_rows`
    does."""
    first = list(islice(rows, count))
    previews = preview_rows(first, tokenizer, encoding, input_format, model=model, max_tokens=MAX_RECORD_TOKENS)
    return [row.as_record(MAX_RECORD_TOKENS) for row in previews]


def stage_preview(
    stage: Any, rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None
) -> dict[str, Any]:
    """Return the fields of the event `preview` of a training: {template, records}. Raises UnsupportedTemplate.

    rows: with the columns COLUMNS; model: required by trainings of classifiers and reward models only.
    """
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
    """Return the preview of each row.

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
        encoder = ClassifierEncoder(model, tokenizer, encoding.max_length)
        preview_row = _reward_pair if input_format == "reward_pair" else _classified
        return [preview_row(row, encoder, tokenizer, encoding.max_length) for row in rows]
    preview_functions: dict[str, Callable[[Row, PreTrainedTokenizerBase, Encoding], PreviewRow]] = {
        "conversation": _conversation,
        "pair": _pair,
        "rated": _rated,
        "prompt": _prompt,
        "scored": _scored,
        "all_tokens": _all_tokens,
        "ifd": _ifd,
    }
    return [preview_functions[input_format](row, tokenizer, encoding) for row in rows]


# Rows to sequences, by format


def _row(row: Row, sequences: Sequence[PreviewSequence], reason: str = "") -> PreviewRow:
    return PreviewRow(row.get("id") or "", row.get("source") or "", row.get("line") or 0, tuple(sequences), reason)


def _documents(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, block: int, skip: int, max_tokens: int | None
) -> list[PreviewRow]:
    """Preview each row's part of the blocks. The first token of a block has no loss, since nothing predicts it."""
    encoded = encode_untruncated(rows, tokenizer, Encoding(NO_LIMIT, "all_tokens")) if rows else []
    start = sum(len(item.ids) for item in encoded[:skip])
    previews = []
    for row, item in zip(rows[skip:], encoded[skip:], strict=True):
        first = -start % block
        block_starts = range(first, len(item.ids), block)
        trained = frozenset(range(len(item.ids))) - frozenset(block_starts)
        marks = tuple((index, f"block {(start + index) // block + 1} begins") for index in block_starts)
        sequence = _sequence("", item, tokenizer, block, frozenset(block_starts), max_tokens)
        sequence = replace(sequence, has_loss=bool(item.ids), trained=trained, blocks=True, marks=marks)
        previews.append(_row(row, [sequence]))
        start += len(item.ids)
    return previews


def _conversation(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> PreviewRow:
    (parts,) = encode_sequences([row], tokenizer, encoding)
    if len(parts) == 1:
        return _row(row, [_with_loss("", row, parts[0], tokenizer, encoding)])
    labels = [f"part {number} of {len(parts)}" for number in range(1, len(parts) + 1)]
    # The parts complement each other, so none of them is previewed with cuts.
    return _row(row, [_sequence(*part, tokenizer, encoding.max_length) for part in zip(labels, parts, strict=True)])


def _pair(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> PreviewRow:
    (encoded,) = encode_pairs([row], tokenizer, encoding)
    if not encoded.sequences:
        return _row(row, [], encoded.unusable)
    sides = [
        (label, side, item)
        for side, (label, item) in enumerate(zip(("chosen", "rejected"), encoded.sequences, strict=True))
    ]
    previews = _responses(row, sides, tokenizer, encoding)
    return _row(row, previews, "" if any(sequence.reason for sequence in previews) else encoded.unusable)


def _rated(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> PreviewRow:
    (encoded,) = encode_rated([row], tokenizer, encoding)
    sides = [
        ("desirable" if label else "undesirable", 1 if row.get("rejected") and not label else 0, item)
        for label, item in zip(encoded.labels, encoded.sequences, strict=True)
    ]
    previews = _responses(row, sides, tokenizer, encoding)
    return _row(row, previews, "" if any(sequence.reason for sequence in previews) else encoded.unusable)


def _prompt(row: Row, tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> PreviewRow:
    (encoded,) = encode_prompt_rows([row], tokenizer, encoding)
    if not encoded.sequences:
        return _row(row, [], encoded.unusable)
    (item,) = encoded.sequences
    sequence = _sequence("", item, tokenizer, encoding.max_length)
    if encoded.unusable == TOO_LONG:
        reason = f"its prompt has {len(item.ids):,} tokens, and max_length allows {encoding.max_length:,}"
        sequence = replace(sequence, reason=reason)
    return _row(row, [replace(sequence, marks=((len(item.ids), "generation begins here"),) if item.ids else ())])


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


def _classified(
    row: Row, encoder: ClassifierEncoder, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreviewRow:
    return _row(row, [_classifier_sequence("", row, encoder([row])[0], encoder, tokenizer, max_length)])


def _reward_pair(
    row: Row, encoder: ClassifierEncoder, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreviewRow:
    (encoded,) = encode_reward_pairs([row], tokenizer, encoder.encoding)
    if not encoded.sequences:
        return _row(row, [], encoded.unusable)
    chosen, rejected = encoded.sequences
    sides = [
        _classifier_sequence("chosen", row, chosen, encoder, tokenizer, max_length),
        _classifier_sequence("rejected", rejected_side(row), rejected, encoder, tokenizer, max_length),
    ]
    return _row(row, sides, "" if any(side.reason for side in sides) else encoded.unusable)


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
        sequence = _sequence(label, item, tokenizer, encoding.max_length)
    else:
        kept = kept_indices(item, source, encoding.truncate, tokenizer)
        sequence = _with_kept(label, item, source.full.ids, kept, tokenizer, encoding.max_length)
    if not item.num_loss_tokens and not sequence.reason:
        sequence = replace(sequence, reason="no response is left to train on: it is empty, masked, or cut off")
    return sequence


def _with_kept(
    label: str,
    item: Encoded,
    full: Sequence[int],
    kept: Sequence[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
) -> PreviewSequence:
    """Preview a sequence with its cuts. `kept`: index in `full` of each token of `item`; None if unknown."""
    positions = None if kept is None else cut_positions(kept, len(full))
    edges = frozenset(index for index, _, _ in positions or ())
    return with_cuts(_sequence(label, item, tokenizer, max_length, edges), full, positions, tokenizer)


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
        messages = (
            "an assistant message" if item.dropped_reasoning == 1 else f"{item.dropped_reasoning} assistant messages"
        )
        notes.append(f"the chat template drops the reasoning of {messages}")
    if item.escaped_tokens:
        tokens = "a special token" if item.escaped_tokens == 1 else f"{item.escaped_tokens} special tokens"
        notes.append(f"{tokens} in the row's own text is encoded as ordinary text")
    head, tail_start = len(item.ids), len(item.ids)
    if max_tokens is not None and len(item.ids) > max_tokens:
        head = max_tokens * 3 // 4
        tail_start -= max_tokens - head
    groups = list(token_groups(item.ids, tokenizer, edges, 0, head))
    if head < tail_start:
        groups.append(TokenGroup(tuple(item.ids[head:tail_start]), "", False, omitted=True))
        groups += token_groups(item.ids, tokenizer, edges, tail_start)
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
    label: str, row: Row, item: Encoded, encoder: ClassifierEncoder, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> PreviewSequence:
    encoding = encoder.encoding
    (full,) = encode_classifier_inputs([row], tokenizer, replace(encoding, max_length=NO_LIMIT))
    if not item.ids or len(item.ids) == len(full.ids):
        sequence = _sequence(label, item, tokenizer, max_length)
        return sequence if item.ids or item.rejected else replace(sequence, reason=NO_TOKEN)
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
        kept = kept_of_text(full.ids, item.ids)
    return _with_kept(label, item, full.ids, kept, tokenizer, max_length)


# Summaries of the text and tokens around rows


def template_summary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe the behaviour of the chat template in one sentence. Raises UnsupportedTemplate."""
    profile = chat_template_of(tokenizer).profile
    calls = "not rendered"
    if profile.tool_calls:
        parts = [("results", profile.tool_results), ("definitions of tools", profile.tools)]
        rendered = [name for name, is_rendered in parts if is_rendered]
        not_rendered = [name for name, is_rendered in parts if not is_rendered]
        calls = "rendered" + (f" with {' and '.join(rendered)}" if rendered else "")
        calls += f", without {' and '.join(not_rendered)}" if not_rendered else ""
    if profile.reasoning:
        thinking = "rendered" if profile.earlier_reasoning else "rendered in the last message only"
    else:
        thinking = "dropped from responses before the last" if profile.thinking_model else "not rendered"
    sentences = [
        f"a response ends with {' or '.join(profile.end_tokens) or 'no token'}"
        + (f" ({profile.appended_end} is added after the last message)" if profile.appended_end else ""),
        f"generation begins after {profile.generation_prompt!r}" if profile.generation_prompt else "",
        f"system messages are {'rendered' if profile.system else 'not supported'}",
        "" if profile.multi_turn else "only one prompt with one response is supported",
        f"tool calls are {calls}",
        f"reasoning is {thinking}",
    ]
    return "; ".join(sentence for sentence in sentences if sentence)


def text_summary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Describe the special tokens around a text in one sentence."""
    starts_with_bos = tokenizer.bos_token_id is not None and tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id]
    begin = f"begins with {tokenizer.bos_token}" if starts_with_bos else "has no token before it"
    end = f"ends with {tokenizer.eos_token}" if tokenizer.eos_token is not None else "has no end token"
    return f"a text {begin} and {end}"
