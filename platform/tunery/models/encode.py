"""Rows to tokens: the same functions for scoring, training, evaluation and generation.

A text becomes the tokens that the tokenizer makes of it, special tokens included (BOS exactly where the tokenizer adds
one), and an end token. A conversation is rendered by the chat template (models/chat_template.py); the responses of its
assistant turns, each with its end token, are trained and all else is masked. Special tokens in the text of a row are
encoded as ordinary text: nobody's question may end a turn.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, Literal

from tunery.models.chat_template import RenderedConversation, chat_template_of
from tunery.models.template_rendering import RejectedConversation, any_of
from tunery.models.tokenize import IDS_ONLY, tokenize, tokenize_pieces
from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TrainOn = Literal["all_turns", "last_turn", "all_tokens"]
ENCODING_VERSION = 1
"""Raise it when a change gives other tokens or spans for the same rows: tokenised rows are rebuilt, and so are the
models that were trained on them."""
Truncation = Literal["right", "left", "drop", "split"]
Span = tuple[int, int]
"""Begin and end of trained tokens."""


@dataclass(frozen=True)
class Encoding:
    """How rows become training sequences. All of it changes the tokens, and so belongs to the cache key."""

    max_length: int
    """Tokens of a sequence, at most."""
    train_on: TrainOn = "all_turns"
    """all_turns: every assistant turn whose `weight` is not 0; last_turn: the last turn of the row; all_tokens: every
    token, as pre-training has it, whatever the weights."""
    truncate: Truncation = "right"
    """right: a conversation ends after the last response that fits; a text, and a single response, loses its end.
    left: a conversation loses its oldest turns (not the system turn), then the beginning of its prompt.
    drop: a longer row is not used. split: what is cut off becomes further sequences."""
    empty_thinking: Literal["mask", "train"] = "mask"
    """Of an empty thinking block before a response."""


NO_LIMIT = 2**31 - 1


def encoding_of(stage: Any) -> Encoding:
    """The settings of a stage (tunery.spec) that decide the tokens it trains on, or answers. Texts of `pretrain` are
    not cut: its blocks are, wherever they end. A prompt is not cut either: it would end in the middle of a question."""
    if stage.kind == "pretrain":
        return Encoding(NO_LIMIT, "all_tokens")
    if hasattr(stage, "sampling"):
        return Encoding(stage.max_length - stage.sampling.max_new_tokens, "last_turn", "drop")
    return Encoding(
        stage.max_length,
        getattr(stage, "train_on", "last_turn"),
        getattr(stage, "truncate", "left"),
        getattr(stage, "empty_thinking", "mask"),
    )


@dataclass(frozen=True)
class Encoded:
    """A sequence of tokens and the spans of it that are trained. The first token of a sequence is never predicted, so
    it never counts."""

    ids: list[int]
    spans: tuple[Span, ...]
    truncated: bool = False
    generation_prompt_ids: tuple[int, ...] = ()
    """What the chat template puts before a response ("<|assistant|>"); empty for a text."""
    rejected: str = ""
    """Why the row can't be used; then there are no tokens."""
    dropped_reasoning: int = 0
    """Assistant turns whose reasoning the chat template does not render."""
    escaped_tokens: int = 0
    """Special tokens in the row's own text, encoded as ordinary text."""
    token_types: list[int] | None = None
    """Which of the two texts of a pair each token belongs to, where the tokenizer tells (BERT's)."""

    @property
    def num_loss_tokens(self) -> int:
        return sum(end - max(start, 1) for start, end in self.spans if end > 1)

    @property
    def loss_indices(self) -> list[int]:
        """Positions of the tokens that have a loss."""
        return [index for start, end in self.spans for index in range(max(start, 1), end)]

    @property
    def labels(self) -> list[int]:
        """`ids` with -100 where no loss counts, as transformers has it."""
        return labels_of(self.ids, self.spans)

    @property
    def response(self) -> Span:
        """The last span; empty, at the end, where nothing is trained."""
        return self.spans[-1] if self.spans else (len(self.ids), len(self.ids))


def labels_of(ids: Sequence[int], spans: Iterable[Span]) -> list[int]:
    labels = [-100] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


def encode_whole(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[Encoded]:
    """One sequence for each row, whatever its length."""
    texts = [index for index, row in enumerate(rows) if not row.get("messages")]
    found: dict[int, Encoded] = dict(
        zip(texts, _encode_texts([rows[index]["text"] or "" for index in texts], tokenizer), strict=True)
    )
    if len(texts) < len(rows):
        template = chat_template_of(tokenizer)
        prompt_ids = tuple(tokenize([template.profile.generation_prompt], tokenizer)[0])
        pieces: list[list[str]] = []
        drafts: dict[int, Encoded] = {}
        kept: list[list[bool]] = []
        for index, row in enumerate(rows):
            if index in found:
                continue
            try:
                conversation = template.conversation(row, encoding.empty_thinking == "mask")
                trained = _trained_turns(row, encoding.train_on)
            except RejectedConversation as error:
                found[index] = Encoded([], (), rejected=str(error))
                continue
            pieces.append(_pieces(conversation))
            kept.append([span.turn in trained for span in conversation.spans])
            drafts[index] = Encoded(
                [],
                (),
                generation_prompt_ids=prompt_ids,
                dropped_reasoning=conversation.dropped_reasoning,
                escaped_tokens=conversation.escaped_tokens,
            )
        for (index, draft), tokens, keeps in zip(drafts.items(), tokenize_pieces(pieces, template), kept, strict=True):
            edges = list(accumulate((len(piece) for piece in tokens), initial=0))
            responses = zip(edges[1::2], edges[2::2], keeps, strict=False)
            spans = tuple((start, end) for start, end, keep in responses if keep and start < end)
            if encoding.train_on == "all_tokens":
                spans = ((0, edges[-1]),)
            found[index] = replace(draft, ids=list(chain.from_iterable(tokens)), spans=spans)
    return [found[index] for index in range(len(rows))]


def _pieces(conversation: RenderedConversation) -> list[str]:
    """The text before the first response, the response, the text before the second and so on. Every response is a piece
    of its own, trained or not: then the tokens before it are the same whatever is trained, and those that a model is
    given to generate it."""
    cuts = [0, *(at for span in conversation.spans for at in (span.start, span.end)), len(conversation.text)]
    return [conversation.text[start:end] for start, end in pairwise(cuts)]


def as_prompt(row: Row) -> Row:
    """A conversation up to its last response; without any turn where nothing is asked."""
    turns = row.get("messages") or []
    return {**row, "messages": turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns}


def encode_prompts(prompts: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Tokens of each prompt, up to where its response begins: those that `encode` has before the response."""
    template = chat_template_of(tokenizer)
    texts: list[list[str]] = []
    reasons: list[str] = []
    for prompt in prompts:
        try:
            pieces, reason = _pieces(template.prompt(prompt)), ""
        except RejectedConversation as error:
            pieces, reason = [], str(error)
        texts.append(pieces)
        reasons.append(reason)
    tokens = tokenize_pieces(texts, template)
    return [
        Encoded(list(chain.from_iterable(ids)), (), rejected=reason)
        for ids, reason in zip(tokens, reasons, strict=True)
    ]


def template_suffix_ids(tokenizer: PreTrainedTokenizerBase, end: Iterable[int]) -> list[int]:
    """What the chat template puts behind the token that ends an answer (a line end, in Qwen's); often nothing."""
    template = chat_template_of(tokenizer)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids = tokenize_pieces([[template.conversation({"messages": turns}).text]], template)[0][0]
    stops = set(end)
    last = next((index for index in reversed(range(len(ids))) if ids[index] in stops), len(ids) - 1)
    return ids[last + 1 :]


def _trained_turns(row: Row, train_on: TrainOn) -> set[int]:
    """Raises RejectedConversation for a weight other than 0 and 1: a loss counts or it does not."""
    turns: list[Mapping[str, Any]] = row["messages"]
    if train_on == "all_tokens":
        return set()
    weights = {turn.get("weight") for turn in turns}
    if odd := sorted(str(weight) for weight in weights - {None, 0, 1}):
        raise RejectedConversation(f"a turn has the weight {odd[0]}; only 0 and 1 are supported")
    assistant = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if train_on == "last_turn":
        assistant = [index for index in assistant if index == len(turns) - 1]
    return {index for index in assistant if turns[index].get("weight") != 0}


def _encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    if not texts:
        return []
    special = any_of(tokenizer.all_special_tokens)
    counts = [len(special.findall(text)) for text in texts]
    found: dict[int, list[int]] = {}
    for split in (False, True):
        mine = [index for index, count in enumerate(counts) if (count > 0) == split]
        if mine:
            ids = tokenizer([texts[index] for index in mine], split_special_tokens=split, **IDS_ONLY)["input_ids"]
            found |= zip(mine, ids, strict=True)
    eos = tokenizer.eos_token_id
    encoded = []
    for index, count in enumerate(counts):
        ids = list(found[index])
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        encoded.append(Encoded(ids, ((0, len(ids)),), escaped_tokens=count))
    return encoded
