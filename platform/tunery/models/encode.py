"""Rows to tokens, the same for scoring, training and evaluation: what a filter sees is what training sees."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tunery.store.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Encoded:
    """`answer` is the index of the first token that counts: 0 for a text, the answer's first for a conversation.

    The very first token of a sequence is never predicted, so it never counts.
    """

    ids: list[int]
    answer: int
    truncated: bool
    opening: list[int]
    """What the chat template puts before an answer ("<|assistant|>"): the prompt's last tokens, none for a text."""

    @property
    def counted(self) -> int:
        """Tokens that have a loss."""
        return max(0, len(self.ids) - max(self.answer, 1))

    @property
    def alone(self) -> list[int]:
        """The counted tokens after nothing but the opening."""
        return self.opening + self.ids[self.answer :]

    @property
    def labels(self) -> list[int]:
        """`ids` with -100 where no loss counts, as transformers has it."""
        return [-100] * self.answer + self.ids[self.answer :]


def encode(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Encoded]:
    """Tokens of each row, cut at the end to `max_length`.

    Prompt and answer are tokenised apart, so that the boundary is where generation will find it. A text ends with the
    end token; a conversation as its chat template says.
    """
    parts = [_prompt_and_answer(row, tokenizer) for row in rows]
    prompts = _tokenise([prompt for prompt, _ in parts], tokenizer)
    answers = _tokenise([answer for _, answer in parts], tokenizer)
    opening = _tokenise([_opening(tokenizer)], tokenizer)[0]
    encoded = []
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        ids = prompt + answer
        if not row.get("messages") and tokenizer.eos_token_id is not None:
            ids = [*ids, tokenizer.eos_token_id]
        cut = min(len(prompt), max_length)
        encoded.append(Encoded(ids[:max_length], cut, len(ids) > max_length, opening if prompt else []))
    return encoded


def as_prompt(row: Row) -> Row:
    """A conversation up to its last answer: what is asked. Raises ValueError for a row in which nothing is."""
    turns = row.get("messages") or []
    if turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if not turns:
        raise ValueError("a row without a question")
    return {**row, "messages": turns}


def encode_prompts(prompts: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Tokens of each prompt, up to where its answer begins: the same that `encode` puts before an answer."""
    texts = []
    for prompt in prompts:
        messages, tools = _conversation(prompt)
        texts.append(
            str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=True))
        )
    return _tokenise(texts, tokenizer)


def closing_tokens(tokenizer: PreTrainedTokenizerBase, end: Collection[int]) -> list[int]:
    """What the chat template puts behind the token that ends an answer (a line end, in Qwen's); often nothing."""
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    (ids,) = _tokenise([str(tokenizer.apply_chat_template(turns, tokenize=False))], tokenizer)
    last = next((place for place in reversed(range(len(ids))) if ids[place] in end), len(ids) - 1)
    return ids[last + 1 :]


def rendered(row: Row, tokenizer: PreTrainedTokenizerBase) -> str:
    """A whole conversation as the tokenizer's chat template has it."""
    messages, tools = _conversation(row)
    return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False))


def _prompt_and_answer(row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    if not row.get("messages"):
        return "", row["text"]
    messages, tools = _conversation(row)
    whole = rendered(row, tokenizer)
    if messages[-1]["role"] != "assistant":
        return whole, ""
    prompt = str(tokenizer.apply_chat_template(messages[:-1], tools=tools, tokenize=False, add_generation_prompt=True))
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    # Templates that rewrite earlier turns (thinking parts dropped, dates): find the answer itself.
    answer = messages[-1]["content"]
    if not answer:  # tool calls alone: they begin where the whole leaves the prompt
        return _split(
            whole, next((at for at, (a, b) in enumerate(zip(whole, prompt, strict=False)) if a != b), len(prompt))
        )
    return _split(whole, whole.rfind(answer))


def _split(whole: str, at: int) -> tuple[str, str]:
    return (whole[:at], whole[at:]) if at > 0 else ("", whole)


def _opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What `add_generation_prompt` adds to a conversation; "" where the template knows no such thing."""
    question = [{"role": "user", "content": "?"}]
    without = str(tokenizer.apply_chat_template(question, tokenize=False))
    with_it = str(tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True))
    return with_it[len(without) :] if with_it.startswith(without) else ""


def _conversation(row: Row) -> tuple[list[dict[str, Any]], Any]:
    """Messages and tools, as chat templates take them."""
    return [_message(turn) for turn in row["messages"]], json.loads(row["tools"]) if row.get("tools") else None


def _message(turn: Row) -> dict[str, Any]:
    """A turn as chat templates take it: they ask whether there is `tool_calls`, so it is left out where it is null."""
    message: dict[str, Any] = {"role": turn["role"], "content": turn["content"]}
    if turn.get("tool_calls"):
        message["tool_calls"] = json.loads(turn["tool_calls"])
    return message


def _tokenise(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    if not any(texts):
        return [[] for _ in texts]
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids


def blocks(encoded: Iterable[Encoded], length: int) -> Iterator[list[int]]:
    """All tokens one after another, cut into blocks of `length`; the rest that fills no block is left out.

    Documents share blocks without a mask between them, as in GPT-3 (https://arxiv.org/abs/2005.14165, section 2.2).
    """
    pending: list[int] = []
    for item in encoded:
        pending.extend(item.ids)
        while len(pending) >= length:
            yield pending[:length]
            pending = pending[length:]
