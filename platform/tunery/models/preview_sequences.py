"""Data structures of previews: rows and their token sequences as text, with the kind of each token, and their
conversion to JSON and to records of the event log. `token_groups` decodes tokens to text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SegmentKind = Literal["trained", "masked", "input", "cut", "mark"]
"""Kind of a segment. trained, masked: tokens with and without a loss; input: tokens of a sequence in which no token has
a loss; cut: tokens that truncation has removed; mark: a note at a position, such as the beginning of a block."""
_CONTEXT_TOKENS = 8
"""Number of preceding tokens that are decoded as context: some tokenizers (Llama 2's) drop the leading space of the
first token of a text."""
_MAX_GROUP = 16
"""Maximum number of tokens decoded together. A character has at most four bytes, but a token may hold the end of one
character and the beginning of the next."""
_REPLACEMENT = "\ufffd"


@dataclass(frozen=True)
class TokenGroup:
    """Tokens that are displayed together: one token, or several whose bytes only together form complete characters."""

    ids: tuple[int, ...]
    text: str
    special: bool
    """Whether it is a special token, or an added token such as `<think>`. The same characters in a row's own text are
    not special."""
    omitted: bool = False
    """Whether these tokens are the middle of a long document, which is not decoded."""

    def display_text(self, with_ids: bool) -> str:
        """Return the text of the group, with `with_ids` after the token ids."""
        if not with_ids:
            return self.text
        end = "" if self.text.endswith("\n") else "  "
        return f"{'+'.join(map(str, self.ids))}:{self.text}{end}"


@dataclass(frozen=True)
class Segment:
    """Adjacent tokens of the same kind."""

    kind: SegmentKind
    text: str
    special: bool = False
    num_tokens: int = 0


@dataclass(frozen=True)
class Cut:
    """Adjacent tokens removed by truncation."""

    index: int
    """Index of the kept token that follows the removed tokens."""
    groups: tuple[TokenGroup, ...]
    """Removed tokens that are displayed."""
    hidden_before: int = 0
    """Number of removed tokens before `groups`."""
    hidden_after: int = 0
    """Number of removed tokens after `groups`."""

    @property
    def num_tokens(self) -> int:
        """Number of removed tokens."""
        return self.hidden_before + sum(len(group.ids) for group in self.groups) + self.hidden_after

    def as_json(self) -> dict[str, Any]:
        text = "".join(group.text for group in self.groups)
        return {"index": self.index, "num_tokens": self.num_tokens, "text": text}


@dataclass(frozen=True)
class PreviewSequence:
    """An input sequence of the model."""

    label: str
    """Which of a row's sequences it is ("chosen", "part 1 of 2"); "" if there is only one."""
    ids: tuple[int, ...]
    groups: tuple[TokenGroup, ...]
    """Decoded `ids`, in order."""
    has_loss: bool
    """Whether any token has a loss; False for prompts and inputs of classifiers."""
    trained: frozenset[int]
    """Indices of the tokens with a loss."""
    max_length: int
    """Maximum number of tokens, or tokens per block."""
    blocks: bool = False
    """Whether it is a document, which is split into blocks."""
    truncated: bool = False
    """Whether the stage's encoding has truncated it."""
    cuts: tuple[Cut, ...] = ()
    """Removed tokens, ascending; empty if their positions are unknown."""
    cut_tokens: int = 0
    """Number of removed tokens."""
    marks: tuple[tuple[int, str], ...] = ()
    """(index in `ids`, text) of marked positions, ascending."""
    reason: str = ""
    """Why the sequence is not used; "" if it is."""
    notes: tuple[str, ...] = ()

    def segments(self, max_tokens: int | None = None, with_ids: bool = False) -> list[Segment]:
        """Return the text in order, with adjacent tokens of the same kind joined. `max_tokens`: the middle of a longer
        sequence is omitted. `with_ids`: format each token as `id:text`."""
        pieces = list(self._pieces(with_ids))
        if max_tokens is not None and len(pieces) > max_tokens:
            head = max_tokens * 3 // 4
            tail = max_tokens - head
            pieces = [*pieces[:head], _omitted(sum(piece.num_tokens for piece in pieces[head:-tail])), *pieces[-tail:]]
        joined: list[Segment] = []
        for key, group in groupby(pieces, key=lambda piece: (piece.kind, piece.special, piece.kind == "mark")):
            adjacent = list(group)
            joined += adjacent if key[2] else [replace(adjacent[0], text="".join(piece.text for piece in adjacent))]
        return joined

    def token_kind(self, index: int) -> SegmentKind:
        """Return the kind of the token at `index`."""
        if not self.has_loss:
            return "input"
        return "trained" if index in self.trained else "masked"

    def _pieces(self, with_ids: bool) -> Iterator[Segment]:
        index = 0
        marks, cuts = list(self.marks), list(self.cuts)
        for group in self.groups:
            while cuts and cuts[0].index <= index:
                yield from self._cut_pieces(cuts.pop(0), with_ids)
            while marks and marks[0][0] <= index:
                yield Segment("mark", marks.pop(0)[1])
            if group.omitted:
                yield _omitted(len(group.ids))
                marks = [mark for mark in marks if mark[0] >= index + len(group.ids)]
            else:
                yield Segment(self.token_kind(index), group.display_text(with_ids), group.special, len(group.ids))
            index += len(group.ids)
        for cut in cuts:
            yield from self._cut_pieces(cut, with_ids)
        for _, text in marks:
            yield Segment("mark", text)

    def _cut_pieces(self, cut: Cut, with_ids: bool) -> Iterator[Segment]:
        yield Segment("mark", "cut off")
        if cut.hidden_before:
            yield Segment("mark", f"{cut.hidden_before:,} more tokens")
        for group in cut.groups:
            yield Segment("cut", group.display_text(with_ids), group.special)
        if cut.hidden_after:
            yield Segment("mark", f"{cut.hidden_after:,} more tokens")
        if cut.index < len(self.ids):
            yield Segment("mark", "end of what is cut off")

    def as_json(self) -> dict[str, Any]:
        """Return a JSON object. `ids`, `tokens`, `trained` and `special` have one entry per token; the text of a
        character with several tokens is in the last one's entry. The text of a long cut is only its displayed part."""
        tokens: list[str] = []
        special: list[bool] = []
        for group in self.groups:
            tokens += [""] * (len(group.ids) - 1) + [group.text]
            special += [group.special] * len(group.ids)
        return {
            **self.common_fields(),
            "ids": list(self.ids),
            "tokens": tokens,
            "trained": [index in self.trained for index in range(len(self.ids))],
            "special": special,
            "marks": [{"index": index, "text": text} for index, text in self.marks],
            "cuts": [cut.as_json() for cut in self.cuts],
        }

    def as_record(self, max_tokens: int) -> dict[str, Any]:
        """Return a record for the event log, with segments instead of tokens. The middle of a sequence with more than
        `max_tokens` is omitted."""
        segments = [[segment.kind, segment.text, int(segment.special)] for segment in self.segments(max_tokens)]
        return {**self.common_fields(), "segments": segments}

    def common_fields(self) -> dict[str, Any]:
        """Return the fields that `as_json` and `as_record` share."""
        return {
            "label": self.label,
            "num_tokens": len(self.ids),
            "num_trained": len(self.trained) if self.has_loss else None,
            "max_length": self.max_length,
            "blocks": self.blocks,
            "truncated": self.truncated,
            "cut_tokens": self.cut_tokens,
            "reason": self.reason,
            "notes": list(self.notes),
        }


def _omitted(num_tokens: int) -> Segment:
    return Segment("mark", f"{num_tokens:,} tokens are omitted here", num_tokens=num_tokens)


@dataclass(frozen=True)
class PreviewRow:
    """A row with its sequences."""

    id: str
    source: str
    line: int
    sequences: tuple[PreviewSequence, ...]
    reason: str = ""
    """Why the row is not used, if none of its sequences has a reason."""

    def as_json(self) -> dict[str, Any]:
        return {**self.common_fields(), "sequences": [sequence.as_json() for sequence in self.sequences]}

    def as_record(self, max_tokens: int) -> dict[str, Any]:
        return {**self.common_fields(), "sequences": [sequence.as_record(max_tokens) for sequence in self.sequences]}

    def common_fields(self) -> dict[str, Any]:
        return {"id": self.id, "source": self.source, "line": self.line, "reason": self.reason}


# Tokens to text


def token_groups(
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    edges: frozenset[int] = frozenset(),
    start: int = 0,
    stop: int | None = None,
) -> Iterator[TokenGroup]:
    """Decode `ids[start:stop]` token by token. Tokens that only together form complete characters are one group; a
    group never extends across an index of `edges`. The concatenated texts of all groups are the text of the
    sequence."""
    special = special_tokens(tokenizer)
    stop = len(ids) if stop is None else stop
    while start < stop:
        end = start + 1
        if ids[start] in special:
            yield TokenGroup((ids[start],), special[ids[start]], True)
            start = end
            continue
        text = _text_between(ids, start, end, tokenizer)
        while text.endswith(_REPLACEMENT) and end < stop and end - start < _MAX_GROUP:
            if end in edges or ids[end] in special:
                break
            end += 1
            text = _text_between(ids, start, end, tokenizer)
        yield TokenGroup(tuple(ids[start:end]), text, False)
        start = end


def _text_between(ids: Sequence[int], start: int, end: int, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text that the tokens from `start` to `end` add to the text of the tokens before them."""
    context = max(0, start - _CONTEXT_TOKENS)
    before = _decode(ids[context:start], tokenizer)
    with_context = _decode(ids[context:end], tokenizer)
    if with_context.startswith(before):
        return with_context[len(before) :]
    return _decode(ids[start:end], tokenizer)


def _decode(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> Mapping[int, str]:
    """Return the text by id of special tokens, and of added tokens that are not white space (Gemma adds runs of
    spaces)."""
    return {
        index: token.content
        for index, token in tokenizer.added_tokens_decoder.items()
        if token.special or token.content.strip()
    }
