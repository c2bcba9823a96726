"""Rows longer than `max_length`: the tokens that each policy keeps, and that every lost trained token is counted."""

from __future__ import annotations

import json
import time
from collections import Counter
from typing import Any

import pytest

from tunery.models.encode import Encoded, Encoding, encode_untruncated
from tunery.models.scratch import train_tokenizer
from tunery.models.truncation import encode_sequences

CALL = json.dumps([{"type": "function", "function": {"name": "look", "arguments": {"n": 1}}}])


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_tokenizer(["what is the answer to a question of a user, and a tool's result"] * 3, 400)


def turn(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def calling(calls: int) -> dict[str, Any]:
    """One question, many calls of a tool and their results, and an answer."""
    rounds = [
        part
        for number in range(calls)
        for part in (turn("assistant", "", tool_calls=CALL), turn("tool", f"result {number}"))
    ]
    return {"messages": [turn("user", "what is it"), *rounds, turn("assistant", "the answer")]}


def chatting(rounds: int) -> dict[str, Any]:
    turns = [(turn("user", f"question {n}"), turn("assistant", f"answer {n}")) for n in range(rounds)]
    return {"messages": [turn("system", "be brief"), *(part for pair in turns for part in pair)]}


def untruncated(row: dict[str, Any], tokenizer: Any) -> Encoded:
    return encode_untruncated([row], tokenizer, Encoding(10**6))[0]


def cut(row: dict[str, Any], tokenizer: Any, limit: int, policy: Any, **fields: Any) -> list[Encoded]:
    (actual,) = encode_sequences([row], tokenizer, Encoding(limit, truncate=policy, **fields))
    assert all(len(item.ids) <= limit for item in actual)
    return actual


def responses(items: list[Encoded], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(item.ids[start:end]) for item in items for start, end in item.spans]


def test_left_keeps_the_loss_of_all_responses_within_the_window(tokenizer: Any) -> None:
    row = calling(20)
    before = untruncated(row, tokenizer)
    (actual,) = cut(row, tokenizer, len(before.ids) - 30, "left")
    assert actual.truncated
    assert len(before.spans) - 2 <= len(actual.spans) < len(before.spans)
    assert responses([actual], tokenizer) == responses([before], tokenizer)[-len(actual.spans) :]


def test_left_drops_the_oldest_turns_and_keeps_the_system_turn(tokenizer: Any) -> None:
    row = chatting(12)
    (actual,) = cut(row, tokenizer, len(untruncated(row, tokenizer).ids) // 2, "left")
    text = tokenizer.decode(actual.ids)
    assert text.startswith("<|system|>be brief<|end|><|user|>question ")
    assert text.endswith("answer 11<|end|>")
    assert responses([actual], tokenizer) == [f"answer {n}<|end|>" for n in range(12 - len(actual.spans), 12)]


def test_left_truncation_needs_few_renderings(tokenizer: Any) -> None:
    row = chatting(240)
    begin = time.process_time()
    cut(row, tokenizer, 400, "left")
    left = time.process_time() - begin
    begin = time.process_time()
    cut(row, tokenizer, 400, "right")
    assert left < 25 * max(0.01, time.process_time() - begin)


def test_right_truncation_ends_after_the_last_response_that_fits(tokenizer: Any) -> None:
    row = chatting(12)
    (actual,) = cut(row, tokenizer, len(untruncated(row, tokenizer).ids) // 2, "right")
    assert responses([actual], tokenizer) == [f"answer {n}<|end|>" for n in range(len(actual.spans))]
    assert actual.ids[-1] == tokenizer.eos_token_id


def test_drop_gives_the_same_reason_for_every_row(tokenizer: Any) -> None:
    reasons = {cut(chatting(rounds), tokenizer, 50, "drop")[0].rejected for rounds in (12, 13)}
    assert reasons == {"it is longer than max_length (50 tokens)"}


@pytest.mark.parametrize("limit", [24, 40, 64, 100])
@pytest.mark.parametrize(
    "row",
    [
        calling(20),
        chatting(12),
        {"messages": [turn("user", "what is it"), turn("assistant", "a long answer " * 40)]},
        {"messages": [turn("user", "a long question " * 40), turn("assistant", "the answer")]},
    ],
    ids=["calls", "turns", "long answer", "long question"],
)
def test_split_trains_every_response_token_once(row: dict[str, Any], limit: int, tokenizer: Any) -> None:
    before = untruncated(row, tokenizer)
    actual = cut(row, tokenizer, limit, "split")
    trained = Counter(item.ids[index] for item in actual for start, end in item.spans for index in range(start, end))
    expected = Counter(before.ids[index] for start, end in before.spans for index in range(start, end))
    assert trained == expected


def test_split_with_last_turn_trains_the_last_turn_alone(tokenizer: Any) -> None:
    row = chatting(12)
    actual = cut(row, tokenizer, 60, "split", train_on="last_turn")
    assert responses(actual, tokenizer) == ["answer 11<|end|>"]


def test_text_is_split_into_windows_without_a_gap(tokenizer: Any) -> None:
    row = {"text": "a question and an answer " * 30}
    actual = cut(row, tokenizer, 32, "split")
    assert [token for item in actual for token in item.ids] == untruncated(row, tokenizer).ids
