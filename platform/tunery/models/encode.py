"""Encode rows as token sequences, by the same functions for scoring, training, evaluation and generation.

A text is tokenized with special tokens (BOS only if the tokenizer adds it) and an EOS token. A conversation is rendered
by the chat template (models/chat_template.py). Its assistant responses, each with its EOS token, have a loss; all other
tokens are masked. Special tokens in the text of a row are encoded as ordinary text, so that a user message can't end
itself and begin another one.
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
ENCODING_VERSION = 2
"""Increase this when a change produces other tokens or spans for the same rows: tokenised rows, and the models trained
on them, are then rebuilt."""
Truncation = Literal["right", "left", "drop", "split"]
Span = tuple[int, int]
"""Start and end index of tokens that have a loss: [start, end)."""


@dataclass(frozen=True)
class Encoding:
    """How rows are encoded. All fields change the tokens, so all are part of the cache key."""

    max_length: int
    """Maximum tokens of a sequence."""
    train_on: TrainOn = "all_turns"
    """all_turns: every assistant message whose `weight` is not 0; last_turn: the last message, if it is an assistant's;
    all_tokens: every token, as in pre-training, whatever the weights."""
    truncate: Truncation = "right"
    """right: keep a conversation up to the last response that fits; truncate the end of a text or a single response.
    left: drop the oldest messages (not the system message), then the start of the prompt.
    drop: skip longer rows. split: continue longer rows in further sequences."""
    empty_thinking: Literal["mask", "train"] = "mask"
    """Whether an empty thinking block before a response has a loss."""


NO_LIMIT = 2**31 - 1
"""`max_length` of sequences that are not truncated."""


@dataclass(frozen=True)
class Encoded:
    """A token sequence, and which of its tokens have a loss."""

    ids: list[int]
    spans: tuple[Span, ...]
    """Tokens that have a loss. The first token of a sequence has none, even within a span, since it is not
    predicted."""
    truncated: bool = False
    generation_prompt_ids: tuple[int, ...] = ()
    """Tokens that the chat template puts before a response ("<|assistant|>"); empty for a text."""
    rejected: str = ""
    """Why the row can't be used; "" if it can. A rejected row has no tokens."""
    dropped_reasoning: int = 0
    """Number of assistant messages whose reasoning the chat template does not render."""
    escaped_tokens: int = 0
    """Number of special tokens in the row's text, encoded as ordinary text."""
    token_types: list[int] | None = None
    """token_type_ids of a pair of texts, if the tokenizer returns them (BERT)."""

    @property
    def num_loss_tokens(self) -> int:
        return sum(end - max(start, 1) for start, end in self.spans if end > 1)

    @property
    def loss_indices(self) -> list[int]:
        """Indices of the tokens that have a loss."""
        return [index for start, end in self.spans for index in range(max(start, 1), end)]

    @property
    def labels(self) -> list[int]:
        """Token ids, with -100 for tokens without a loss, as in transformers."""
        return labels_of(self.ids, self.spans)

    @property
    def response(self) -> Span:
        """The last span; an empty span at the end if no token has a loss."""
        return self.spans[-1] if self.spans else (len(self.ids), len(self.ids))


def labels_of(ids: Sequence[int], spans: Iterable[Span]) -> list[int]:
    """Return `ids` with -100 outside the spans."""
    labels = [-100] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return labels


def encode_untruncated(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, encoding: Encoding) -> list[Encoded]:
    """Encode each row as one sequence, without truncation."""
    texts = [index for index, row in enumerate(rows) if not row.get("messages")]
    encoded: dict[int, Encoded] = dict(
        zip(texts, _encode_texts([rows[index]["text"] or "" for index in texts], tokenizer), strict=True)
    )
    if len(texts) < len(rows):
        template = chat_template_of(tokenizer)
        prompt_ids = tuple(tokenize([template.profile.generation_prompt], tokenizer)[0])
        pieces: list[list[str]] = []
        without_ids: dict[int, Encoded] = {}
        has_loss: list[list[bool]] = []
        for index, row in enumerate(rows):
            if index in encoded:
                continue
            try:
                conversation = template.conversation(row, encoding.empty_thinking == "mask")
                trained_messages = _trained_messages(row, encoding.train_on)
            except RejectedConversation as error:
                encoded[index] = Encoded([], (), rejected=str(error))
                continue
            pieces.append(_pieces(conversation))
            has_loss.append([span.message_index in trained_messages for span in conversation.spans])
            without_ids[index] = Encoded(
                [],
                (),
                generation_prompt_ids=prompt_ids,
                dropped_reasoning=conversation.dropped_reasoning,
                escaped_tokens=conversation.escaped_tokens,
            )
        for (index, item), piece_ids, responses_have_loss in zip(
            without_ids.items(), tokenize_pieces(pieces, template), has_loss, strict=True
        ):
            # Pieces alternate: the text before a response, the response, and so on.
            boundaries = list(accumulate((len(ids) for ids in piece_ids), initial=0))
            responses = zip(boundaries[1::2], boundaries[2::2], responses_have_loss, strict=False)
            spans = tuple(
                (start, end) for start, end, response_has_loss in responses if response_has_loss and start < end
            )
            if encoding.train_on == "all_tokens":
                spans = ((0, boundaries[-1]),)
            encoded[index] = replace(item, ids=list(chain.from_iterable(piece_ids)), spans=spans)
    return [encoded[index] for index in range(len(rows))]


def _pieces(conversation: RenderedConversation) -> list[str]:
    """Split the text into pieces: before the first response, the first response, before the second response and so on.
    Each response is its own piece, with a loss or without, so that the tokens before it are the same as in the prompt
    for generation."""
    boundaries = [
        0,
        *(index for span in conversation.spans for index in (span.start, span.end)),
        len(conversation.text),
    ]
    return [conversation.text[start:end] for start, end in pairwise(boundaries)]


def as_prompt(row: Row) -> Row:
    """Return the row without its last message if that is an assistant's. `messages` of a text is []."""
    messages = row.get("messages") or []
    return {**row, "messages": messages[:-1] if messages and messages[-1]["role"] == "assistant" else messages}


def encode_prompts(prompts: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Encode each prompt up to the start of its response, with the same tokens as in `encode_untruncated`."""
    template = chat_template_of(tokenizer)
    all_pieces: list[list[str]] = []
    reasons: list[str] = []
    for prompt in prompts:
        try:
            pieces, reason = _pieces(template.prompt(prompt)), ""
        except RejectedConversation as error:
            pieces, reason = [], str(error)
        all_pieces.append(pieces)
        reasons.append(reason)
    return [
        Encoded(list(chain.from_iterable(piece_ids)), (), rejected=reason)
        for piece_ids, reason in zip(tokenize_pieces(all_pieces, template), reasons, strict=True)
    ]


def template_suffix_ids(tokenizer: PreTrainedTokenizerBase, eos_token_ids: Iterable[int]) -> list[int]:
    """Return the tokens that the chat template adds after the EOS token of a response (a newline for Qwen); often
    none."""
    template = chat_template_of(tokenizer)
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    ids = tokenize_pieces([[template.conversation({"messages": messages}).text]], template)[0][0]
    eos_ids = set(eos_token_ids)
    last_eos = next((index for index in reversed(range(len(ids))) if ids[index] in eos_ids), len(ids) - 1)
    return ids[last_eos + 1 :]


def _trained_messages(row: Row, train_on: TrainOn) -> set[int]:
    """Return the indices of messages that have a loss. Raises RejectedConversation for weights other than 0 and 1."""
    messages: list[Mapping[str, Any]] = row["messages"]
    if train_on == "all_tokens":
        return set()
    weights = {message.get("weight") for message in messages}
    if invalid := sorted(str(weight) for weight in weights - {None, 0, 1}):
        raise RejectedConversation(f"a message has the weight {invalid[0]}; only 0 and 1 are supported")
    responses = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "last_turn":
        responses = [index for index in responses if index == len(messages) - 1]
    return {index for index in responses if messages[index].get("weight") != 0}


def _encode_texts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Encoded]:
    """Encode texts with an EOS token; special tokens in the texts are encoded as ordinary text."""
    if not texts:
        return []
    special = any_of(tokenizer.all_special_tokens)
    counts = [len(special.findall(text)) for text in texts]
    ids_by_index: dict[int, list[int]] = {}
    for has_special in (False, True):
        indices = [index for index, count in enumerate(counts) if (count > 0) == has_special]
        if indices:
            selected = [texts[index] for index in indices]
            ids = tokenizer(selected, split_special_tokens=has_special, **IDS_ONLY)["input_ids"]
            ids_by_index |= zip(indices, ids, strict=True)
    eos_token_id = tokenizer.eos_token_id
    encoded = []
    for index, count in enumerate(counts):
        ids = list(ids_by_index[index])
        if eos_token_id is not None and ids[-1:] != [eos_token_id]:
            ids.append(eos_token_id)
        encoded.append(Encoded(ids, ((0, len(ids)),), escaped_tokens=count))
    return encoded
