"""Optional fields of a message (reasoning, weight, name, tool_call_id): stored, part of the row id, and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tunery.ingest.corruption import corrupt
from tunery.store import rows as store
from tunery.store.rows import (
    MESSAGES,
    OPTIONAL_MESSAGE_FIELDS,
    Row,
    read_rows,
    row_id,
    shards,
    write_rows,
    write_tables,
)

QUESTION = {"role": "user", "content": "q"}
RESPONSE: dict[str, Any] = {"role": "assistant", "content": "a"}
TOOL_CALLS = json.dumps([{"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}}])
FULL: list[dict[str, Any]] = [
    {**QUESTION, "name": "ann"},
    {**RESPONSE, "content": "", "tool_calls": TOOL_CALLS, "reasoning_content": "think", "weight": 0.0},
    {"role": "tool", "content": "", "name": "f", "tool_call_id": "c1"},
    {**RESPONSE, "reasoning_content": "because", "weight": 0.5},
]


def without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


def test_all_message_fields_survive_the_store(tmp_path: Path) -> None:
    write_rows([{"id": "0" * 16, "messages": FULL, "rejected": [FULL[-1]]}], tmp_path)
    (row,) = read_rows(tmp_path)
    assert without_nulls(row["messages"]) == FULL
    assert without_nulls(row["rejected"]) == [FULL[-1]]
    assert [field.name for field in MESSAGES.value_type] == ["role", "content", *OPTIONAL_MESSAGE_FIELDS]


def test_optional_fields_change_the_row_id_and_nulls_do_not() -> None:
    plain: Row = {"messages": [QUESTION, RESPONSE]}
    fields: list[dict[str, Any]] = [
        {"reasoning_content": "because"},
        {"weight": 0},
        {"weight": 1},
        {"weight": 0.5},
        {"name": "x"},
        {"tool_call_id": "x"},
    ]
    ids = {row_id(plain), *(row_id({"messages": [QUESTION, {**RESPONSE, **field}]}) for field in fields)}
    assert len(ids) == 7
    nulls = {"messages": [{**message, **dict.fromkeys(OPTIONAL_MESSAGE_FIELDS)} for message in (QUESTION, RESPONSE)]}
    assert row_id(nulls) == row_id(plain) == "2dbc5682d0d34079"


def test_row_id_is_unchanged_by_the_store(tmp_path: Path) -> None:
    row: Row = {"messages": [QUESTION, {**RESPONSE, "weight": 1, "reasoning_content": "be\u0301cause \n"}]}
    write_rows([row], tmp_path)
    (read,) = read_rows(tmp_path)
    assert row_id(read) == row_id(row)
    composed = {"messages": [QUESTION, {**RESPONSE, "weight": 1, "reasoning_content": "b\u00e9cause"}]}
    assert row_id(composed) == row_id(row)


def test_shard_bytes_include_reasoning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "SHARD_BYTES", 100)
    rows = [{"id": "0" * 16, "messages": [QUESTION, {**RESPONSE, "reasoning_content": "x" * 60}]} for _ in range(3)]
    write_rows(rows, tmp_path)
    assert [pq.read_metadata(path).num_rows for path in shards(tmp_path)] == [1, 1, 1]


def test_tables_without_the_optional_fields_can_be_written(tmp_path: Path) -> None:
    older = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.string())]))
    fields = [pa.field(field.name, older if field.type == MESSAGES else field.type) for field in store.SCHEMA]
    table = pa.Table.from_pylist([{"id": "0" * 16, "messages": [QUESTION, RESPONSE]}], pa.schema(fields))
    assert write_tables([table], tmp_path) == 1


def test_corrupted_response_keeps_its_other_fields() -> None:
    response = {**RESPONSE, "content": "one two three four five six", "reasoning_content": "because", "weight": 0.5}
    (row,) = corrupt([{"messages": [QUESTION, response]}], 1.0, 0)
    assert row["injected_corruption"]
    assert row["messages"][-1] == {**response, "content": row["messages"][-1]["content"]}
