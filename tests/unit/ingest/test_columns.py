"""Common row formats converted to one schema: ShareGPT, OpenAI with tools, preference pairs, rated responses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from reading import content, dataset

from tunery.ingest.columns import COLUMN_PATTERNS, ROW_BUILDERS, UnknownColumns, converter
from tunery.ingest.formats.record import InvalidRow
from tunery.ingest.read import read_source
from tunery.spec.stages import Dataset
from tunery.store.rows import Row, row_format

SYSTEM = {"role": "system", "content": "s"}
Q, A, B = ({"role": role, "content": text} for role, text in (("user", "q"), ("assistant", "a"), ("assistant", "b")))
HUMAN, GPT, OTHER = ({"from": role, "value": text} for role, text in (("human", "q"), ("gpt", "a"), ("gpt", "b")))
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
TOOL_CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
CALL_MESSAGE = {"role": "assistant", "content": "", "tool_calls": json.dumps([TOOL_CALL])}
CALL_MESSAGE_WITH_ID = {"role": "assistant", "content": "", "tool_calls": json.dumps([{"id": "1", **TOOL_CALL}])}
TOOL_RESULT, FINAL_RESPONSE = {"role": "tool", "content": "2"}, {"role": "assistant", "content": "two"}
PAIR: Row = {"messages": [Q, A], "rejected": [B]}

RECORDS: dict[str, tuple[dict[str, Any], Row, str]] = {
    "sharegpt": ({"conversations": [HUMAN, GPT]}, {"messages": [Q, A]}, "conversation"),
    "sharegpt with a system column": (
        {"conversations": [HUMAN, GPT], "system": "s", "tools": ""},
        {"messages": [SYSTEM, Q, A]},
        "conversation",
    ),
    "sharegpt with tools": (
        {
            "conversations": [
                HUMAN,
                {"from": "function_call", "value": '{"name": "add", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "two"},
            ],
            "tools": json.dumps(TOOLS),
        },
        {"messages": [Q, CALL_MESSAGE, TOOL_RESULT, FINAL_RESPONSE], "tools": json.dumps(TOOLS)},
        "conversation",
    ),
    "OpenAI with tools": (
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": "s"}]},
                Q,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
                    ],
                },
                {"role": "tool", "tool_call_id": "1", "content": "2"},
                {"role": "assistant", "content": "two", "tool_calls": []},
            ],
            "tools": TOOLS,
        },
        {
            "messages": [SYSTEM, Q, CALL_MESSAGE_WITH_ID, {**TOOL_RESULT, "tool_call_id": "1"}, FINAL_RESPONSE],
            "tools": json.dumps(TOOLS),
        },
        "conversation",
    ),
    "messages as JSON text": ({"messages": json.dumps([Q, A])}, {"messages": [Q, A]}, "conversation"),
    "alpaca with a system column": (
        {"instruction": "q", "input": "", "output": "a", "system": "s"},
        {"messages": [SYSTEM, Q, A]},
        "conversation",
    ),
    "prompt and completion as messages": ({"prompt": [Q], "completion": [A]}, {"messages": [Q, A]}, "conversation"),
    "pair of texts": ({"prompt": "q", "chosen": "a", "rejected": "b"}, PAIR, "preference"),
    "pair of messages": ({"prompt": [Q], "chosen": [A], "rejected": [B]}, PAIR, "preference"),
    "pair of conversations": ({"chosen": [Q, A], "rejected": [Q, B]}, PAIR, "preference"),
    "pair of conversations beside their prompt": (
        {"prompt": "q", "chosen": [Q, A], "rejected": [Q, B], "messages": [Q, A]},
        PAIR,
        "preference",
    ),
    "pair in sharegpt": ({"conversations": [HUMAN], "chosen": GPT, "rejected": OTHER}, PAIR, "preference"),
    "pair in alpaca": (
        {"instruction": "q", "input": "i", "chosen": "a", "rejected": "b"},
        {"messages": [{"role": "user", "content": "q\n\ni"}, A], "rejected": [B]},
        "preference",
    ),
    "pair with a system column": (
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        {"messages": [SYSTEM, Q, A], "rejected": [B]},
        "preference",
    ),
    "rated": ({"messages": [Q, A], "label": True}, {"messages": [Q, A], "label": True}, "rated"),
    "rated in sharegpt": (
        {"conversations": [HUMAN, GPT], "kto_tag": False},
        {"messages": [Q, A], "label": False},
        "rated",
    ),
    "rated completion": ({"prompt": "q", "completion": "a", "label": 0}, {"messages": [Q, A], "label": False}, "rated"),
    "rated alpaca": (
        {"instruction": "q", "output": "a", "kto_tag": "True"},
        {"messages": [Q, A], "label": True},
        "rated",
    ),
    "label of something else": (
        {"question": "q", "answer": "a", "label": "easy"},
        {"messages": [Q, A]},
        "conversation",
    ),
}


def read(record: dict[str, Any], folder: Path, **fields: Any) -> Row:
    (folder / "a.jsonl").write_text(json.dumps(record))
    (row,) = read_source(dataset(**fields), folder, pytest.fail)
    return row


def all_content(row: Row) -> Row:
    return {**content(row), **{name: row[name] for name in ("label", "tools") if row.get(name) is not None}}


@pytest.mark.parametrize("name", RECORDS)
def test_record_is_converted_to_the_row_schema(name: str, tmp_path: Path) -> None:
    record, row, expected_format = RECORDS[name]
    converted = read(record, tmp_path)
    assert all_content(converted) == row
    assert row_format(converted) == expected_format


@pytest.mark.parametrize(
    ("columns", "record", "row"),
    [
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, {"p": "q", "c": "a", "r": "b"}, PAIR),
        ({"messages": "m", "chosen": "c", "rejected": "r"}, {"m": [HUMAN], "c": GPT, "r": OTHER}, PAIR),
        ({"chosen": "c", "rejected": "r"}, {"c": [Q, A], "r": [Q, B]}, PAIR),
        ({"messages": "m", "label": "l"}, {"m": [Q, A], "l": "false"}, {"messages": [Q, A], "label": False}),
        ({"messages": "messages"}, {"messages": [Q, A], "label": "fine"}, {"messages": [Q, A]}),
        (
            {"prompt": "p", "input": "i", "completion": "c", "label": "l", "system": "s", "tools": "t"},
            {"p": "q", "i": None, "c": "a", "l": True, "s": "s", "t": TOOLS},
            {"messages": [SYSTEM, Q, A], "label": True, "tools": json.dumps(TOOLS)},
        ),
    ],
)
def test_every_column_role_can_be_configured(columns: Any, record: Any, row: Row, tmp_path: Path) -> None:
    assert all_content(read(record, tmp_path, columns=columns)) == row


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"prompt": "q", "chosen": [Q, A, Q, A], "rejected": [Q, B]}, "differ in more than the last assistant message"),
        ({"chosen": [A], "rejected": [B]}, "responses without a prompt"),
        ({"messages": [Q, A], "chosen": [A], "rejected": [B]}, "have no prompt"),
        ({"prompt": "q", "completion": None}, "response is missing"),
        ({"prompt": "q", "chosen": "a", "rejected": None}, "rejected is missing"),
        ({"messages": [Q, A], "label": None}, "label is None"),
        ({"messages": [Q, A], "system": 5}, "system is int, not text"),
        ({"messages": [Q, A], "tools": [5]}, "tools is not a list of tools"),
        ({"messages": [Q, A], "tools": [{"x": "\ud800"}]}, "a lone surrogate"),
    ],
)
def test_incomplete_row_is_invalid_and_not_read_as_another_format(record: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRow, match=reason):
        converter(record, None)(record)


def test_every_column_pattern_has_a_row_builder_and_every_role_is_configurable() -> None:
    roles = set(Dataset.model_fields["columns"].annotation.__args__[0].__args__[0].__args__)  # type: ignore[union-attr]
    assert roles == {role for needed, allowed, _ in ROW_BUILDERS for role in f"{needed} {allowed}".split()}
    for pattern in COLUMN_PATTERNS:
        columns = [word.removesuffix("?").partition("=") for word in pattern.split()]
        converter({name or role: "x" for role, _, name in columns}, None)
    with pytest.raises(UnknownColumns, match="columns: `body`"):
        converter({"body": "x"}, None)
