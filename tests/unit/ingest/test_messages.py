"""Messages in source files: reasoning, weights, roles, tool calls, history, and the reasons for invalid rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from reading import build_dataset

from tunery.errors import SpecErrors
from tunery.ingest.formats.record import InvalidRow
from tunery.ingest.messages import ROLES, MessageReader, tools_json
from tunery.ingest.read import Quarantined, ReadCounts, read_source, validate_source
from tunery.ingest.sources import BUILTIN, BadSource
from tunery.review.review_items import ReviewItem, RowOutcome
from tunery.spec import Dataset
from tunery.spec.loader import load
from tunery.store.rows import OPTIONAL_MESSAGE_FIELDS, Row, read_rows, write_rows

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}


def read(folder: Path, *records: dict[str, Any], **fields: Any) -> tuple[list[Row], list[str], dict[str, int]]:
    """Return the rows, the reasons in the quarantine, and the counts of ignored columns."""
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    quarantined: list[Quarantined] = []
    counts = ReadCounts()
    rows = list(read_source(Dataset(kind="dataset", source="a.jsonl", **fields), folder, quarantined.append, counts))
    return rows, [f"{line.line}: {line.reason}" for line in quarantined], dict(counts.ignored)


def read_messages(*given: dict[str, Any]) -> list[Any]:
    return MessageReader().read_messages(list(given))


def calls_of(**message: Any) -> list[Any]:
    (result,) = read_messages({"role": "assistant", **message})
    calls: list[Any] = json.loads(result["tool_calls"])
    return calls


# Reasoning.


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("form", [("role", "assistant", "content"), ("from", "gpt", "value")])
def test_reasoning_is_read_from_each_of_its_keys(key: str, form: tuple[str, str, str]) -> None:
    role, name, content = form
    (message,) = read_messages({role: name, key: "because", content: "a"})
    assert message == {**A, "reasoning_content": "because"}


def test_message_may_have_reasoning_and_tool_calls_without_content() -> None:
    call = {"name": "f", "arguments": {}}
    for content in ({}, {"content": None}, {"content": " "}):
        (message,) = read_messages({"role": "assistant", "reasoning": "because", "tool_calls": [call], **content})
        assert (message["content"], message["reasoning_content"]) == ("", "because")
        assert json.loads(message["tool_calls"]) == [{"type": "function", "function": call}]
    assert read_messages({"role": "assistant", "reasoning": "because", "content": ""})[0]["content"] == ""


def test_empty_reasoning_is_omitted_and_a_thinking_flag_is_ignored() -> None:
    reader = MessageReader()
    assert reader.read_messages([{**A, "reasoning_content": " ", "thinking": None}]) == [A]
    assert not reader.ignored
    assert reader.read_messages([{**A, "thinking": False}, {**Q, "reasoning": "x"}]) == [A, Q]
    assert reader.ignored == {"messages[].reasoning_content"}
    with pytest.raises(InvalidRow, match="the reasoning of message 1 is dict, not text"):
        read_messages({**A, "reasoning_content": {"a": 1}})


def test_reasoning_column_is_added_to_the_response(tmp_path: Path) -> None:
    expected = [Q, {**A, "reasoning_content": "because"}]
    (row,), _, _ = read(tmp_path, {"prompt": "q", "completion": "a", "reasoning_content": "because"})
    assert row["messages"] == expected
    names = {"prompt": "Question", "reasoning_content": "Complex_CoT", "completion": "Response"}
    (row,), _, ignored = read(tmp_path, {"Question": "q", "Complex_CoT": "because", "Response": "a"}, columns=names)
    assert row["messages"] == expected
    assert not ignored


# Weights.


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        ({"weight": 0}, 0.0),
        ({"weight": 1}, 1.0),
        ({"weight": 0.25}, 0.25),
        ({"weight": False}, 0.0),
        ({"train": False}, 0.0),
        ({"training": True}, 1.0),
        ({"loss": False}, 0.0),
        ({"weight": 0.5, "train": True}, 0.5),
        ({"weight": None}, None),
        ({"loss": 2.5}, None),
        ({}, None),
    ],
)
def test_weight_of_an_assistant_message_is_kept(given: dict[str, Any], weight: float | None) -> None:
    (message,) = read_messages({**A, **given})
    assert message.get("weight") == weight


@pytest.mark.parametrize("weight", ["x", "1", -1, float("nan"), float("inf"), 10**400, [1]])
def test_invalid_weight_makes_the_row_invalid(weight: Any) -> None:
    with pytest.raises(InvalidRow, match=r"the weight of message 2 is .*, not a finite number >= 0"):
        read_messages(Q, {**A, "weight": weight})


def test_nonzero_weight_of_other_messages_is_ignored_and_counted(tmp_path: Path) -> None:
    record = {"messages": [{**Q, "weight": 1}, {**A, "weight": 1}]}
    (row,), _, ignored = read(tmp_path, record)
    assert row["messages"] == [Q, {**A, "weight": 1.0}]
    assert ignored == {"messages[].weight of user": 1}
    _, _, ignored = read(tmp_path, {"messages": [{**Q, "weight": 0}, A]}, {"messages": [{**Q, "train": False}, A]})
    assert not ignored


# History.


@pytest.mark.parametrize(
    "history",
    [
        [["q1", "a1"], ["q2", "a2"]],
        '[["q1", "a1"], ["q2", "a2"]]',
        [
            {"role": role, "content": content}
            for role, content in zip(("user", "assistant") * 2, ["q1", "a1", "q2", "a2"], strict=True)
        ],
    ],
)
def test_history_is_added_before_the_prompt_in_order(history: Any, tmp_path: Path) -> None:
    contents = ["q1", "a1", "q2", "a2", "q"]
    rows, quarantined, ignored = read(
        tmp_path,
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": history},
        {"prompt": "q", "completion": "a", "system": "s", "history": history},
        {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s", "history": history},
        {"prompt": "q", "system": "s", "history": history},
    )
    assert not quarantined
    assert not ignored
    for row, response in zip(rows, (["a"], ["a"], ["a"], []), strict=True):
        assert [message["content"] for message in row["messages"]] == ["s", *contents, *response]
        assert [message["role"] for message in row["messages"][1:6]] == [
            "user",
            "assistant",
            "user",
            "assistant",
            "user",
        ]


def test_empty_history_is_omitted_and_a_malformed_one_makes_the_row_invalid(tmp_path: Path) -> None:
    alpaca = {"instruction": "q", "output": "a"}
    empty: list[Any] = [None, [], "", "[]"]
    malformed: list[Any] = [[["q1"]], [["q1", "a1"], "q2"], [["q1", " "]], [["q1", 5]], {"q1": "a1"}, "earlier"]
    rows, quarantined, _ = read(tmp_path, *({**alpaca, "history": history} for history in [*empty, *malformed]))
    assert [row["messages"] for row in rows] == [[Q, A]] * 4
    assert quarantined == [
        "5: history[0] is not (prompt, response)",
        "6: history[1] is not (prompt, response)",
        "7: the response of history[0] is empty",
        "8: the response of history[0] is int, not text",
        "9: history is dict, not a list of (prompt, response)",
        "10: history is not JSON",
    ]


# Empty messages.


@pytest.mark.parametrize("content", [{"content": ""}, {"content": " \n"}, {"content": None}, {}])
def test_empty_system_message_is_omitted_and_an_empty_tool_result_is_kept(content: dict[str, Any]) -> None:
    assert read_messages({"role": "system", **content}, Q, A) == [Q, A]
    (result,) = read_messages({"role": "tool", **content})
    assert result["content"] == (content.get("content") or "")
    with pytest.raises(InvalidRow, match="has only an empty system message"):
        read_messages({"role": "system", **content})


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("calls", [{}, {"tool_calls": []}, {"tool_calls": None, "function_call": None}])
def test_empty_user_or_assistant_message_makes_the_row_invalid(role: str, calls: dict[str, Any]) -> None:
    with pytest.raises(InvalidRow, match="message 1 is empty"):
        read_messages({"role": role, "content": " ", **calls})
    with pytest.raises(InvalidRow, match="message 1 has no role or no content"):
        read_messages({"role": role, **calls})


# Roles.


@pytest.mark.parametrize("name", [name for name, role in ROLES.items() if role != "function_call"])
def test_known_role_is_recognized_in_any_case_and_with_white_space(name: str) -> None:
    for spelling in (name, name.upper(), f" {name.title()}\n"):
        assert read_messages({"role": spelling, "content": "x"}) == [{"role": ROLES[name], "content": "x"}]


def test_unknown_role_is_an_error_that_names_the_field_to_set(tmp_path: Path) -> None:
    record = {"messages": [{"role": "Customer", "content": "q"}, A]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(BadSource, match="has no valid row") as caught:
        validate_source(Dataset(kind="dataset", source="a.jsonl"), tmp_path)
    assert "a.jsonl:1: message 1 has the role 'Customer': map it with `roles`" in caught.value.cause
    (row,), _, _ = read(tmp_path, record, roles={" customer": "user"})
    assert row["messages"] == [Q, A]


def test_configured_roles_override_the_known_ones_and_may_be_numbers() -> None:
    reader = MessageReader({"Model": "user", "0": "assistant"})
    assert reader.read_messages([{"role": "model", "content": "q"}, {"role": 0, "content": "a"}]) == [Q, A]


def test_configured_keys_replace_the_usual_ones(tmp_path: Path) -> None:
    record = {"dialog": [{"speaker": "customer", "text": "q"}, {"speaker": "agent", "text": "a", "why": "because"}]}
    fields: dict[str, Any] = {
        "columns": {"messages": "dialog"},
        "roles": {"customer": "user", "agent": "assistant"},
        "message_keys": {"role": "speaker", "content": "text", "reasoning_content": "why"},
    }
    (row,), quarantined, ignored = read(tmp_path, record, **fields)
    assert (quarantined, ignored) == ([], {})
    assert row["messages"] == [Q, {**A, "reasoning_content": "because"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("roles: {customer: human}", '`stages.rows.roles.customer` can\'t be "human"'),
        ("roles: {Bob: user, bob: user}", "the role bob has two meanings"),
        ('roles: {A: user, " a": assistant}', "the role a has two meanings"),
        ("roles: {}", "`stages.rows.roles` can't be {}"),
        ("message_keys: {speaker: role}", "`stages.rows.message_keys"),
    ],
)
def test_invalid_roles_and_keys_are_rejected_with_their_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"name: x\nseed: 1\nstages:\n  rows:\n    kind: dataset\n    source: a.jsonl\n    {line}\n")
    with pytest.raises(SpecErrors) as caught:
        load(file)
    (error,) = caught.value.errors
    assert error.line == 7
    assert message in str(error)


@pytest.mark.parametrize("field", ["roles", "message_keys"])
def test_roles_and_keys_of_a_builtin_source_are_rejected(field: str, tmp_path: Path) -> None:
    value = {"roles": {"bob": "user"}, "message_keys": {"role": "speaker"}}[field]
    stage = Dataset(kind="dataset", source=BUILTIN, subset="questions", **{field: value})  # type: ignore[arg-type]
    with pytest.raises(BadSource, match=field):
        validate_source(stage, tmp_path)


# Tool calls.


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"x": 1}, {"x": 1}),
        ('{"x": null}', {"x": None}),
        (None, {}),
        ("", {}),
        ("null", {}),
        ("{}", {}),
        ([1], [1]),
        ("[1]", [1]),
        ("print(1)", "print(1)"),
        ("5", "5"),
    ],
)
def test_tool_call_arguments_become_an_object_if_possible(arguments: Any, expected: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": expected}}
    assert calls_of(tool_calls=[{"function": {"name": "f", "arguments": arguments}}]) == [call]
    assert calls_of(tool_calls={"name": "f", "arguments": arguments}) == [call]
    assert calls_of(content=None, function_call={"name": "f", "arguments": arguments}) == [call]
    (message,) = read_messages({"from": "function_call", "value": json.dumps({"name": "f", "arguments": arguments})})
    assert json.loads(message["tool_calls"]) == [call]


def test_tool_result_keeps_its_name_and_tool_call_id() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    call_message, result = read_messages(
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "2"},
    )
    assert json.loads(call_message["tool_calls"])[0]["id"] == "c1"
    assert result == {"role": "tool", "content": "2", "name": "f", "tool_call_id": "c1"}


def test_function_call_format_is_read(tmp_path: Path) -> None:
    messages = [
        Q,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "2"},
        A,
    ]
    (row,), quarantined, ignored = read(tmp_path, {"messages": messages, "functions": [FUNCTION]})
    assert (quarantined, ignored) == ([], {})
    assert row["messages"][2] == {"role": "tool", "content": "2", "name": "f"}
    assert json.loads(row["tools"]) == [{"type": "function", "function": FUNCTION}]


def test_bare_function_is_wrapped_as_a_tool() -> None:
    wrapped = {"type": "function", "function": FUNCTION}
    assert tools_json([FUNCTION, wrapped]) == json.dumps([wrapped, wrapped])
    assert tools_json(json.dumps(FUNCTION)) == json.dumps([wrapped])
    assert tools_json("[]") is None


# Multimodal rows.


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [{**Q, "content": "<image>q"}, A], "images": ["a.png"]},
        {"messages": [{**Q, "content": "<image>q"}, A], "images": []},
        {"messages": [{**Q, "content": "<video> q"}, A], "video": "a.mp4"},
        {"messages": [Q, A], "images": ["a.png"]},
        {"messages": [Q, A], "image": {"bytes": "x", "path": None}},
        {"messages": [Q, A], "images": '["a.png"]'},
        {"messages": [{**Q, "images": ["a.png"]}, A]},
        {"messages": [{**Q, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, A]},
        {"messages": [{**Q, "content": [{"type": "text", "text": "q"}, {"type": "input_audio"}]}, A]},
        {"prompt": "<audio>q", "completion": "a", "audio": "a.wav"},
    ],
)
def test_multimodal_row_is_quarantined_and_a_file_of_such_rows_is_rejected(
    record: dict[str, Any], tmp_path: Path
) -> None:
    rows, quarantined, _ = read(tmp_path, record, {"messages": [Q, A]})
    assert len(rows) == 1
    assert len(quarantined) == 1
    assert "images, videos or audio are not supported" in quarantined[0]
    read(tmp_path, record, record)
    with pytest.raises(BadSource, match="has multimodal rows") as caught:
        validate_source(Dataset(kind="dataset", source="a.jsonl"), tmp_path)
    assert caught.value.field == "source"


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [Q, A], "images": []},
        {"messages": [Q, A], "images": [None], "audio": ""},
        {"messages": [{**Q, "content": "what is <image> in SVG?"}, A]},
        {"messages": [Q, A], "image": "https://example.org/a.png"},
        {"text": "a caption", "image": {"bytes": "x"}},
    ],
)
def test_text_row_is_kept_despite_media_columns(record: dict[str, Any], tmp_path: Path) -> None:
    rows, quarantined, _ = read(tmp_path, record)
    assert (len(rows), quarantined) == (1, [])


def test_configured_columns_read_the_text_of_rows_with_images(tmp_path: Path) -> None:
    record = {"messages": [Q, A], "images": ["a.png"]}
    (row,), _, ignored = read(tmp_path, record, columns={"messages": "messages"})
    assert row["messages"] == [Q, A]
    assert ignored == {"images": 1}


# Ignored columns and keys.


def test_ignored_columns_and_keys_are_counted_by_rows(tmp_path: Path) -> None:
    rows, quarantined, ignored = read(
        tmp_path,
        {"messages": [{**Q, "lang": "en"}, {**A, "lang": "en"}], "topic": "x", "note": None},
        {"messages": [Q, A], "topic": "y", "note": "", "tags": []},
        {"messages": [Q, {**A, "content": ""}], "topic": "quarantined"},
        {"messages": [{"role": "system", "content": "t"}, Q, A], "system": "s"},
        {"messages": [Q, {**A, "tool_calls": [{"index": 0, "function": {"name": "f"}}]}]},
    )
    assert (len(rows), len(quarantined)) == (4, 1)
    assert ignored == {
        "topic": 2,
        "messages[].lang": 1,
        "system messages, replaced by the system column": 1,
        "messages[].tool_calls[].index": 1,
    }


def test_prompt_that_differs_from_the_conversations_is_counted(tmp_path: Path) -> None:
    pair = {"chosen": [Q, A], "rejected": [Q, {**A, "content": "b"}]}
    rows, _, ignored = read(tmp_path, {"prompt": "q", **pair}, {"prompt": [Q], **pair})
    assert (len(rows), ignored) == (2, {})
    rows, _, ignored = read(tmp_path, {"prompt": "another", **pair})
    assert (len(rows), ignored) == (1, {"prompt, which differs from the conversations": 1})


@pytest.mark.parametrize("form", ["xlsx", "csv"])
def test_columns_without_a_name_are_counted(form: str, tmp_path: Path) -> None:
    lines = [["question", "", "answer", ""], ["q", "note", "a", ""], ["q", "", "a", ""], ["q", "n", "a", "m"]]
    if form == "csv":
        (tmp_path / "a.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    else:
        book = openpyxl.Workbook()
        for line in lines:
            book.worksheets[0].append(line)
        book.save(tmp_path / "a.xlsx")
    counts = ReadCounts()
    stage = Dataset(kind="dataset", source=f"a.{form}")
    assert len(list(read_source(stage, tmp_path, pytest.fail, counts))) == 3
    assert counts.ignored == {"(a column without a name)": 2}


def test_facts_list_a_bounded_number_of_ignored_columns(tmp_path: Path) -> None:
    records = [{"text": "t", "topic": "x", f"key {number}": 1} for number in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result, _ = build_dataset(tmp_path, "out", Dataset(kind="dataset", source="a.jsonl"))
    ignored = result.facts["ignored_columns"]
    assert ignored["topic"] == 300
    assert len(ignored) <= 101
    assert sum(ignored.values()) == 600


# Review.


def without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in message.items() if value is not None} for message in messages]


@pytest.fixture
def full() -> list[Any]:
    return read_messages(
        {**Q, "name": "ann"},
        {**A, "content": "", "tool_calls": [{"id": "c1", "function": {"name": "f"}}], "thinking": "t", "weight": 0},
        {"role": "tool", "content": "", "name": "f", "tool_call_id": "c1"},
        {**A, "reasoning": "because", "weight": 0.5},
    )


def test_review_item_has_reasoning_and_tool_calls(full: list[Any], tmp_path: Path) -> None:
    write_rows([{"id": "0" * 16, "messages": full}], tmp_path)
    (row,) = read_rows(tmp_path)
    assert without_nulls(row["messages"]) == full
    assert set(row["messages"][0]) == {"role", "content", *OPTIONAL_MESSAGE_FIELDS}
    messages = ReviewItem("0" * 16, row, RowOutcome(True, {}, {})).messages
    assert [message["content"] for message in messages] == [
        "q",
        "Reasoning:\nt\n\nCalls f: {}",
        "",
        "Reasoning:\nbecause\n\na",
    ]
    assert [message["judged"] for message in messages] == [False, False, False, True]
    assert set(messages[0]) == {"role", "content", "judged"}
