"""Rows longer than `max_length`: the tokens that each policy keeps, and that `split` loses no trained token."""

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


def message(role: str, content: str, **fields: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **fields}


def tool_call_conversation(calls: int) -> dict[str, Any]:
    """A question, `calls` tool calls with their results, and a final response."""
    tool_rounds = [
        item
        for number in range(calls)
        for item in (message("assistant", "", tool_calls=CALL), message("tool", f"result {number}"))
    ]
    return {"messages": [message("user", "what is it"), *tool_rounds, message("assistant", "the answer")]}


def chat(rounds: int) -> dict[str, Any]:
    rounds_of_messages = [
        (message("user", f"question {n}"), message("assistant", f"answer {n}")) for n in range(rounds)
    ]
    return {"messages": [message("system", "be brief"), *(item for pair in rounds_of_messages for item in pair)]}


def encode_full(row: dict[str, Any], tokenizer: Any) -> Encoded:
    return encode_untruncated([row], tokenizer, Encoding(10**6))[0]


def encode_truncated(row: dict[str, Any], tokenizer: Any, limit: int, policy: Any, **fields: Any) -> list[Encoded]:
    (actual,) = encode_sequences([row], tokenizer, Encoding(limit, truncate=policy, **fields))
    assert all(len(item.ids) <= limit for item in actual)
    return actual


def responses(items: list[Encoded], tokenizer: Any) -> list[str]:
    return [tokenizer.decode(item.ids[start:end]) for item in items for start, end in item.spans]


def test_left_trains_every_response_within_the_window(tokenizer: Any) -> None:
    row = tool_call_conversation(20)
    full = encode_full(row, tokenizer)
    (actual,) = encode_truncated(row, tokenizer, len(full.ids) - 30, "left")
    assert actual.truncated
    assert len(full.spans) - 2 <= len(actual.spans) < len(full.spans)
    assert responses([actual], tokenizer) == responses([full], tokenizer)[-len(actual.spans) :]


def test_left_drops_the_oldest_messages_and_keeps_the_system_message(tokenizer: Any) -> None:
    row = chat(12)
    (actual,) = encode_truncated(row, tokenizer, len(encode_full(row, tokenizer).ids) // 2, "left")
    text = tokenizer.decode(actual.ids)
    assert text.startswith("<|system|>be brief<|end|><|user|>question ")
    assert text.endswith("answer 11<|end|>")
    assert responses([actual], tokenizer) == [f"answer {n}<|end|>" for n in range(12 - len(actual.spans), 12)]


def test_left_truncation_time_is_bounded_for_many_turns(tokenizer: Any) -> None:
    row = chat(240)
    start = time.process_time()
    encode_truncated(row, tokenizer, 400, "left")
    left_seconds = time.process_time() - start
    start = time.process_time()
    encode_truncated(row, tokenizer, 400, "right")
    assert left_seconds < 25 * max(0.01, time.process_time() - start)


def test_right_truncation_ends_after_the_last_response_that_fits(tokenizer: Any) -> None:
    row = chat(12)
    (actual,) = encode_truncated(row, tokenizer, len(encode_full(row, tokenizer).ids) // 2, "right")
    assert responses([actual], tokenizer) == [f"answer {n}<|end|>" for n in range(len(actual.spans))]
    assert actual.ids[-1] == tokenizer.eos_token_id


def test_drop_rejects_every_long_row_for_the_same_reason(tokenizer: Any) -> None:
    reasons = {encode_truncated(chat(rounds), tokenizer, 50, "drop")[0].rejected for rounds in (12, 13)}
    assert reasons == {"it is longer than max_length (50 tokens)"}


@pytest.mark.parametrize("limit", [24, 40, 64, 100])
@pytest.mark.parametrize(
    "row",
    [
        tool_call_conversation(20),
        chat(12),
        {"messages": [message("user", "what is it"), message("assistant", "a long answer " * 40)]},
        {"messages": [message("user", "a long question " * 40), message("assistant", "the answer")]},
    ],
    ids=["calls", "turns", "long answer", "long question"],
)
def test_split_trains_every_response_token_once(row: dict[str, Any], limit: int, tokenizer: Any) -> None:
    full = encode_full(row, tokenizer)
    actual = encode_truncated(row, tokenizer, limit, "split")
    trained = Counter(item.ids[index] for item in actual for start, end in item.spans for index in range(start, end))
    expected = Counter(full.ids[index] for start, end in full.spans for index in range(start, end))
    assert trained == expected


def test_split_with_last_turn_trains_only_the_last_turn(tokenizer: Any) -> None:
    row = chat(12)
    actual = encode_truncated(row, tokenizer, 60, "split", train_on="last_turn")
    assert responses(actual, tokenizer) == ["answer 11<|end|>"]


def test_split_text_windows_cover_every_token_once(tokenizer: Any) -> None:
    row = {"text": "a question and an answer " * 30}
    actual = encode_truncated(row, tokenizer, 32, "split")
    assert [token for item in actual for token in item.ids] == encode_full(row, tokenizer).ids
