"""Nested values of Arrow and Parquet files: nulls that fill up structs, and maps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest
from reading import read_file

from tunery.ingest.formats.hub import streamed

TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "string"}}}}},
    {"type": "function", "function": {"name": "g", "parameters": {"properties": {"y": {"type": "number"}}}}},
]
CALLS = [
    {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": "1", "z": [1, None]}}},
    {"id": "2", "type": "function", "function": {"name": "g", "arguments": {"y": 2}}},
]
QUESTION = {"role": "user", "content": "q"}
RECORD: dict[str, Any] = {
    "messages": [QUESTION, {"role": "assistant", "content": None, "tool_calls": CALLS, "weight": 0}],
    "tools": TOOLS,
}


def write(path: Path, records: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(records)
    if path.suffix == ".parquet":
        pq.write_table(table, path)
    else:
        feather.write_feather(table, str(path))


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_null_fields_added_by_arrow_are_removed(ending: str, tmp_path: Path) -> None:
    write(tmp_path / f"a.{ending}", [RECORD])
    (row,), quarantined = read_file(tmp_path, f"a.{ending}")
    assert not quarantined
    assert json.loads(row["tools"]) == TOOLS
    assert json.loads(row["messages"][1]["tool_calls"]) == CALLS
    assert row["messages"][1]["weight"] == 0.0


def test_null_fields_added_by_the_datasets_library_are_removed(tmp_path: Path) -> None:
    datasets.Dataset.from_list([RECORD]).to_parquet(tmp_path / "a.parquet")
    (record,) = streamed(str(tmp_path), None, "train", None)
    assert record.value["tools"] == TOOLS
    assert record.value["messages"][0] == QUESTION


def test_nulls_in_json_text_are_kept(tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"default": None}}}]
    call = {"function": {"name": "f", "arguments": '{"x": null}'}}
    record = {"messages": [QUESTION, {"role": "assistant", "tool_calls": [call]}], "tools": json.dumps(tools)}
    write(tmp_path / "a.parquet", [record])
    (tmp_path / "a.jsonl").write_text(json.dumps({**record, "tools": tools}))
    for name in ("a.parquet", "a.jsonl"):
        (row,), _ = read_file(tmp_path, name)
        assert json.loads(row["tools"]) == tools
        assert json.loads(row["messages"][1]["tool_calls"])[0]["function"]["arguments"] == {"x": None}


def test_arrow_map_becomes_an_object(tmp_path: Path) -> None:
    function = pa.struct([("name", pa.string()), ("arguments", pa.map_(pa.string(), pa.string()))])
    message = pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("tool_calls", pa.list_(pa.struct([("function", function)])))]
    )
    duplicate_keys = [("x", "1"), ("x", "2")]
    messages = [
        [QUESTION, {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
        for arguments in ([("x", "1")], duplicate_keys)
    ]
    table = pa.Table.from_pydict({"messages": messages}, pa.schema([("messages", pa.list_(message))]))
    pq.write_table(table, tmp_path / "a.parquet")
    (row,), quarantined = read_file(tmp_path, "a.parquet")
    assert json.loads(row["messages"][1]["tool_calls"])[0]["function"]["arguments"] == {"x": "1"}
    assert [line.line for line in quarantined] == [2]
    assert quarantined[0].reason.startswith("messages can't be read: ")
