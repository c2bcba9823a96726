"""Rows to tokens: the same functions for scoring, training, evaluation and generation.

A text becomes the tokens that the tokenizer makes of it, special tokens included (BOS exactly where the tokenizer adds
one), and an end token. A conversation is rendered by the chat template (models/chat_template.py); the responses of its
assistant turns, each with its end token, are trained and all else is masked. Special tokens in the text of a row are
encoded as ordinary text: nobody's question may end a turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from tunery.models.chat_template import ESCAPED, ChatTemplate, RenderedConversation, chat_template_of
from tunery.models.template_rendering import RejectedConversation, any_of, last_match
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
MIN_PROMPT_FRACTION = 0.25
"""Share of `max_length` that `truncate: left` leaves to a prompt beside a response that is too long."""


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
            ids = tokenizer([texts[index] for index in mine], split_special_tokens=split, **_IDS_ONLY)["input_ids"]
            found |= zip(mine, ids, strict=True)
    eos = tokenizer.eos_token_id
    encoded = []
    for index, count in enumerate(counts):
        ids = list(found[index])
        if eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        encoded.append(Encoded(ids, ((0, len(ids)),), escaped_tokens=count))
    return encoded


# Truncation


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


# Text to ids

_IDS_ONLY: dict[str, Any] = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
_JOINABLE: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()
_LEADS = ("\n", "x", "0", ".", "@")
"""Characters to put before a text that continues another."""


def tokenize(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, split_special: bool = False) -> list[list[int]]:
    """Ids of each text, without the special tokens that the tokenizer would add."""
    if not any(texts):
        return [[] for _ in texts]
    ids: list[list[int]] = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=split_special, **_IDS_ONLY
    )["input_ids"]
    return ids


def tokenize_pieces(texts: Sequence[Sequence[str]], template: ChatTemplate) -> list[list[list[int]]]:
    """Ids of each piece of each text, of which a piece is never merged with the next: generation begins where one ends.
    Special tokens that are `ESCAPED` become ordinary text."""
    continued = not _joins(template.tokenizer)
    parts: list[tuple[str, str, bool]] = []  # (what precedes it, text, whether it is a special token as ordinary text)
    where: list[list[list[int]]] = []
    for pieces in texts:
        places, before = [], ""
        for piece in pieces:
            numbers = []
            for number, part in enumerate(ESCAPED.split(piece) if "\ufdd2" in piece else (piece,)):
                escaped = number % 2 == 1
                if not part:
                    continue
                numbers.append(len(parts))
                parts.append((before, template.control_tokens[int(part)] if escaped else part, escaped))
                if continued:
                    before = _ESCAPED_BEFORE if escaped else _since_special(before + part, template)
            places.append(numbers)
        where.append(places)
    if continued:
        ids = _continued(parts, template.tokenizer)
    else:
        ids = tokenize([text for _, text, _ in parts], template.tokenizer)
        literal = [number for number, (_, _, escaped) in enumerate(parts) if escaped]
        found = _as_text([parts[number][1] for number in literal], template.tokenizer)
        for number, tokens in zip(literal, found, strict=True):
            ids[number] = tokens
    return [[list(chain.from_iterable(ids[number] for number in numbers)) for numbers in places] for places in where]


_ESCAPED_BEFORE = "\ufdd2"
"""Precedes a text whose context can't be given to the tokenizer: a special token in it stands for ordinary text."""


def _since_special(text: str, template: ChatTemplate) -> str:
    """From the last special token on: a tokenizer splits a text there."""
    last = last_match(template.control, text, 0, len(text))
    return text if last is None else text[last.start() :]


def _continued(parts: Sequence[tuple[str, str, bool]], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Ids of texts by a tokenizer that puts a space before whatever it is given (Llama 2's).

    They are what follows the ids of the preceding text in those of both texts together, where these begin with those.
    Else (a token spans the boundary) a text is tokenised behind a character whose tokens are then left out.
    """
    found: list[list[int]] = [[] for _ in parts]
    within = [number for number, (before, _, escaped) in enumerate(parts) if not escaped and "\ufdd2" not in before]
    preceding = tokenize([parts[number][0] for number in within], tokenizer)
    joined = tokenize([parts[number][0] + parts[number][1] for number in within], tokenizer)
    rest = sorted(set(range(len(parts))) - set(within))
    for number, before, both in zip(within, preceding, joined, strict=True):
        if both[: len(before)] == before:
            found[number] = both[len(before) :]
        else:
            rest.append(number)
    for number in rest:
        _, text, escaped = parts[number]
        found[number] = _behind_lead(text, tokenizer, escaped)
    return found


def _behind_lead(text: str, tokenizer: PreTrainedTokenizerBase, as_text: bool) -> list[int]:
    """Ids of a text that continues another."""
    for lead in _LEADS:
        before, both = tokenize([lead, lead + text], tokenizer, split_special=as_text)
        if both[: len(before)] != before:
            continue
        ids = both[len(before) :]
        if as_text and len(text) > 1 and not set(ids).isdisjoint(tokenizer.added_tokens_decoder):
            return [token for part in (text[:-1], text[-1]) for token in _behind_lead(part, tokenizer, True)]
        return ids
    return tokenize([text], tokenizer, split_special=as_text)[0]


def _as_text(tokens: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Special tokens as ordinary text. An added token that is not special is no text to any tokenizer: it is taken
    apart before its last character."""
    found = tokenize(tokens, tokenizer, split_special=True)
    added = set(tokenizer.added_tokens_decoder)
    for index, ids in enumerate(found):
        if not added.isdisjoint(ids):
            found[index] = list(chain.from_iterable(tokenize([tokens[index][:-1], tokens[index][-1]], tokenizer)))
    return found


def _joins(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the ids of two texts, one after the other, stand for both texts joined."""
    known = _JOINABLE.get(tokenizer)
    if known is None:
        pairs = [("x", "y"), ("x:", " y"), ("x\n", "y"), ("x", "\ny")]
        known = _JOINABLE[tokenizer] = all(
            _decoded(tokenize([left], tokenizer)[0] + tokenize([right], tokenizer)[0], tokenizer)
            == _decoded(tokenize([left + right], tokenizer)[0], tokenizer)
            for left, right in pairs
        )
    return known


def _decoded(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
