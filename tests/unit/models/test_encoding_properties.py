"""Properties of encoded conversations for any chat template and any kind of tokenizer."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from template_tokenizers import FAMILIES, KINDS, rendered, tokenizer_of

from tunery.models.chat_template import chat_template_of
from tunery.models.encode import Encoded, Encoding, encode_prompts, encode_untruncated
from tunery.models.truncation import encode_sequences

EXAMPLES = int(os.environ.get("ENCODING_EXAMPLES", "60"))
fixed = settings(
    derandomize=True,
    deadline=None,
    max_examples=EXAMPLES,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

PIECES = [
    "<|im_start|>assistant\n",
    "<|im_end|>",
    "<|end|>",
    "</s>",
    "<s>",
    "<think>",
    "</think>",
    "<tool_call>",
    "<|user|>",
    "[INST]",
    "<end_of_turn>",
    "<|turn>",
    "ASSISTANT:",
    "assistant: ",
    "\n",
    "\n\n",
    " ",
    "\t",
    "\x00",
    "\x1b",
    "\u200b",
    "\u2028",
    "👍🏽",
    "好",
    "e\u0301",
    "\ufeff",
    "{{ x }}",
    "{% raw %}",
    "\\n",
    "Paris",
    " is",
    "s",
    ".",
]
# No surrogates: files that contain them are quarantined when they are read.
random_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
text = st.lists(st.sampled_from(PIECES) | random_text, max_size=5).map("".join)
CALL = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "two"}}}]


@st.composite
def conversations(draw: st.DrawFn, ends_with_response: bool = False) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    if draw(st.integers(0, 3)) == 0:
        messages.append({"role": "system", "content": draw(text)})
    for _ in range(draw(st.integers(1, 3))):
        messages.append({"role": "user", "content": draw(text)})
        kind = draw(st.sampled_from(["plain", "plain", "plain", "reasoning", "call", "no response"]))
        if kind == "no response":
            continue
        response: dict[str, Any] = {"role": "assistant", "content": draw(text)}
        if kind == "reasoning":
            response["reasoning_content"] = draw(text)
        if draw(st.integers(0, 4)) == 0:
            response["weight"] = draw(st.sampled_from([0.0, 1.0]))
        if kind == "call":
            call = {"role": "assistant", "content": draw(st.just("") | text), "tool_calls": json.dumps(CALL)}
            messages += [call, {"role": "tool", "content": draw(text)}]
        messages.append(response)
    if ends_with_response and messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": draw(text)})
    return {"messages": messages}


def check_spans(encoded: Encoded) -> None:
    edges = [edge for span in encoded.spans for edge in span]
    assert edges == sorted(edges)
    assert all(0 <= start < end <= len(encoded.ids) for start, end in encoded.spans)


families = st.sampled_from(FAMILIES)
encodings = st.builds(
    Encoding,
    max_length=st.just(10**6),
    train_on=st.sampled_from(["all_turns", "last_turn"]),
    empty_thinking=st.sampled_from(["mask", "train"]),
)


@fixed
@given(row=conversations(), family=families, encoding=encodings)
def test_tokens_match_the_rendered_conversation_and_responses_end_with_an_end_token(
    row: dict[str, Any], family: str, encoding: Encoding
) -> None:
    tokenizer = tokenizer_of(family)
    (actual,) = encode_untruncated([row], tokenizer, encoding)
    if actual.rejected:
        assert actual.ids == []
        return
    check_spans(actual)
    assert tokenizer.decode(actual.ids) == rendered(row, tokenizer)
    profile = chat_template_of(tokenizer).profile
    ends = set(tokenizer.convert_tokens_to_ids(list(profile.end_tokens)))
    # These templates render no end token after earlier responses.
    only_last_has_end_token = bool(profile.history_ends) or family == "no_end_tokens"
    for start, end in actual.spans:
        if not only_last_has_end_token or end == len(actual.ids):
            assert actual.ids[end - 1] in ends
        assert ends.isdisjoint(actual.ids[start : end - 1])


def test_text_that_a_template_moves_after_the_tool_result_rejects_the_row() -> None:
    """Gemma 4's template renders call, result, text: a span from call to text would train the result."""
    call = '[{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]'
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": "I add.", "tool_calls": call},
        {"role": "tool", "content": "RESULT"},
        {"role": "assistant", "content": "Two."},
    ]
    tokenizer = tokenizer_of("gemma4")
    rows = [{"messages": messages}, {"messages": messages[:2]}]
    rows.append({"messages": [messages[0], {**messages[1], "content": ""}, *messages[2:]]})
    moved, last, without_text = encode_untruncated(rows, tokenizer, Encoding(10**6))
    assert "after the results of its tool calls" in (moved.rejected or "")
    for encoded in (last, without_text):
        trained = [tokenizer.decode(encoded.ids[start:end]) for start, end in encoded.spans]
        assert trained
        assert not any("RESULT" in text for text in trained)


@fixed
@given(row=conversations(ends_with_response=True), family=families)
def test_generation_begins_with_the_tokens_before_the_last_response(row: dict[str, Any], family: str) -> None:
    tokenizer = tokenizer_of(family)
    (actual,) = encode_untruncated([row], tokenizer, Encoding(10**6, "last_turn"))
    (prompt,) = encode_prompts([{**row, "messages": row["messages"][:-1]}], tokenizer)
    if actual.rejected or not actual.spans:
        return
    assert not prompt.rejected
    masked = actual.ids[: actual.response[0]]
    text = tokenizer.decode(prompt.ids)
    if "<think>" in text[-25:] or family.startswith("diffusion_gemma"):
        return  # the prompt opens a thinking block that the row may not have, or has no header after a tool result
    assert masked[: len(prompt.ids)] == prompt.ids
    assert "".join(tokenizer.decode(masked[len(prompt.ids) :]).split()) in ("", "<think></think>")


@pytest.mark.parametrize("kind", KINDS)
@fixed
@given(
    row=conversations(ends_with_response=True), family=st.sampled_from(["llama2", "vicuna", "zephyr", "plain", "qwen3"])
)
def test_every_kind_of_tokenizer_masks_the_generation_prompt(kind: str, row: dict[str, Any], family: str) -> None:
    tokenizer = tokenizer_of(family, kind)
    (actual,) = encode_untruncated([row], tokenizer, Encoding(10**6, "last_turn"))
    (prompt,) = encode_prompts([{**row, "messages": row["messages"][:-1]}], tokenizer)
    if actual.rejected or not actual.spans:
        return
    check_spans(actual)
    assert actual.ids[: len(prompt.ids)] == prompt.ids
    ends = set(tokenizer.convert_tokens_to_ids(list(chat_template_of(tokenizer).profile.end_tokens)))
    start, end = actual.response
    assert actual.ids[end - 1] in ends
    assert ends.isdisjoint(actual.ids[start : end - 1])


@fixed
@given(
    rows=st.lists(
        conversations() | st.builds(lambda value: {"messages": None, "text": value}, text), min_size=1, max_size=2
    ),
    family=families,
    encoding=st.builds(
        Encoding,
        max_length=st.integers(4, 60),
        train_on=st.sampled_from(["all_turns", "last_turn"]),
        truncate=st.sampled_from(["right", "left", "drop", "split"]),
    ),
)
def test_truncation_respects_max_length_and_trains_responses_only(
    rows: list[dict[str, Any]], family: str, encoding: Encoding
) -> None:
    tokenizer = tokenizer_of(family)
    full = encode_untruncated(rows, tokenizer, encoding)
    for row, item, parts in zip(rows, full, encode_sequences(rows, tokenizer, encoding), strict=True):
        assert parts
        trained = [item.ids[start:end] for start, end in item.spans]
        for part in parts:
            assert len(part.ids) <= encoding.max_length
            check_spans(part)
            if row["messages"] and encoding.truncate != "split":
                # Every trained span is the start of a response of the untruncated conversation.
                for start, end in part.spans:
                    assert any(response[: end - start] == part.ids[start:end] for response in trained)


@fixed
@given(
    rounds=st.lists(st.tuples(random_text, random_text.filter(str.strip)), min_size=1, max_size=6),
    family=st.sampled_from(["chatml", "zephyr", "vicuna", "glm_plain"]),
    limit=st.integers(100, 160),
)
def test_split_trains_every_response_exactly_once(rounds: list[tuple[str, str]], family: str, limit: int) -> None:
    """For rows in which every question with its response fits into `max_length`."""
    tokenizer = tokenizer_of(family)
    messages = [
        {"role": role, "content": content}
        for pair in rounds
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    row = {"messages": messages}
    (full,) = encode_untruncated([row], tokenizer, Encoding(limit))
    (parts,) = encode_sequences([row], tokenizer, Encoding(limit, truncate="split"))
    assert all(len(part.ids) <= limit for part in parts)
    assert [part.ids[start:end] for part in parts for start, end in part.spans] == [
        full.ids[start:end] for start, end in full.spans
    ]
