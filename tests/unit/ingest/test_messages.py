"""Messages in source files: reasoning, weights, roles, tool calls, history, and the reasons for invalid rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from pydantic import ValidationError
from reading import make

from tunery.errors import SpecErrors
from tunery.ingest.formats.record import InvalidRow
from tunery.ingest.messages import ROLES, MessageReader, tools_json
from tunery.ingest.read import Quarantined, ReadCounts, check_source, read_source
from tunery.ingest.sources import BUILTIN, BadSource
from tunery.review.review_items import ReviewItem, RowOutcome
from tunery.spec import Dataset
from tunery.spec.loader import load
from tunery.store.rows import OPTIONAL_TURN_FIELDS, Row, read_rows, write_rows

Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
FUNCTION = {"name": "f", "parameters": {"type": "object"}}


def read(folder: Path, *records: dict[str, Any], **fields: Any) -> tuple[list[Row], list[str], dict[str, int]]:
    """Rows, reasons of the quarantine, and what was ignored."""
    (folder / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    bad: list[Quarantined] = []
    tally = ReadCounts()
    rows = list(read_source(Dataset(kind="dataset", source="a.jsonl", **fields), folder, bad.append, tally))
    return rows, [f"{line.line}: {line.reason}" for line in bad], dict(tally.ignored)


def turns_of(*given: dict[str, Any]) -> list[Any]:
    return MessageReader().turns(list(given))


def calls_of(**message: Any) -> list[Any]:
    (turn,) = turns_of({"role": "assistant", **message})
    calls: list[Any] = json.loads(turn["tool_calls"])
    return calls


# Reasoning.


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("form", [("role", "assistant", "content"), ("from", "gpt", "value")])
def test_reasoning_of_an_assistant_is_kept_under_each_of_its_names(key: str, form: tuple[str, str, str]) -> None:
    role, name, content = form
    (turn,) = turns_of({role: name, key: "because", content: "a"})
    assert turn == {**A, "reasoning_content": "because"}


def test_turn_may_reason_and_call_without_saying_anything() -> None:
    call = {"name": "f", "arguments": {}}
    for content in ({}, {"content": None}, {"content": " "}):
        (turn,) = turns_of({"role": "assistant", "reasoning": "because", "tool_calls": [call], **content})
        assert (turn["content"], turn["reasoning_content"]) == ("", "because")
        assert json.loads(turn["tool_calls"]) == [{"type": "function", "function": call}]
    assert turns_of({"role": "assistant", "reasoning": "because", "content": ""})[0]["content"] == ""


def test_empty_reasoning_is_none_and_a_flag_called_thinking_is_ignored() -> None:
    reader = MessageReader()
    assert reader.turns([{**A, "reasoning_content": " ", "thinking": None}]) == [A]
    assert not reader.ignored
    assert reader.turns([{**A, "thinking": False}, {**Q, "reasoning": "x"}]) == [A, Q]
    assert reader.ignored == {"messages[].reasoning_content"}
    with pytest.raises(InvalidRow, match="the reasoning of turn 1 is dict, not text"):
        turns_of({**A, "reasoning_content": {"a": 1}})


def test_column_of_reasoning_stands_before_the_completion(tmp_path: Path) -> None:
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
def test_weight_of_an_assistants_turn_is_kept(given: dict[str, Any], weight: float | None) -> None:
    (turn,) = turns_of({**A, **given})
    assert turn.get("weight") == weight


@pytest.mark.parametrize("weight", ["x", "1", -1, float("nan"), float("inf"), 10**400, [1]])
def test_weight_that_is_no_number_of_0_or_more_costs_the_row(weight: Any) -> None:
    with pytest.raises(InvalidRow, match=r"the weight of turn 2 is .*, not a number of 0 or more"):
        turns_of(Q, {**A, "weight": weight})


def test_weight_of_other_turns_has_no_effect_and_is_counted_where_it_is_not_0(tmp_path: Path) -> None:
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
            {"role": role, "content": said}
            for role, said in zip(("user", "assistant") * 2, ["q1", "a1", "q2", "a2"], strict=True)
        ],
    ],
)
def test_history_is_the_earlier_turns_in_order(history: Any, tmp_path: Path) -> None:
    contents = ["q1", "a1", "q2", "a2", "q"]
    rows, bad, ignored = read(
        tmp_path,
        {"instruction": "q", "input": "", "output": "a", "system": "s", "history": history},
        {"prompt": "q", "completion": "a", "system": "s", "history": history},
        {"prompt": "q", "chosen": "a", "rejected": "b", "system": "s", "history": history},
        {"prompt": "q", "system": "s", "history": history},
    )
    assert not bad
    assert not ignored
    for row, answer in zip(rows, (["a"], ["a"], ["a"], []), strict=True):
        assert [turn["content"] for turn in row["messages"]] == ["s", *contents, *answer]
        assert [turn["role"] for turn in row["messages"][1:6]] == ["user", "assistant", "user", "assistant", "user"]


def test_no_history_is_none_and_a_malformed_one_costs_the_row(tmp_path: Path) -> None:
    alpaca = {"instruction": "q", "output": "a"}
    nothing: list[Any] = [None, [], "", "[]"]
    wrong: list[Any] = [[["q1"]], [["q1", "a1"], "q2"], [["q1", " "]], [["q1", 5]], {"q1": "a1"}, "earlier"]
    rows, bad, _ = read(tmp_path, *({**alpaca, "history": history} for history in [*nothing, *wrong]))
    assert [row["messages"] for row in rows] == [[Q, A]] * 4
    assert bad == [
        "5: exchange 1 of history is no (question, answer)",
        "6: exchange 2 of history is no (question, answer)",
        "7: the answer of exchange 1 of history is empty",
        "8: the answer of exchange 1 of history is int, not text",
        "9: history is dict, not a list of (question, answer)",
        "10: history is not JSON",
    ]


# Empty turns.


@pytest.mark.parametrize("content", [{"content": ""}, {"content": " \n"}, {"content": None}, {}])
def test_empty_turn_of_the_system_is_none_and_an_empty_result_of_a_tool_is_kept(content: dict[str, Any]) -> None:
    assert turns_of({"role": "system", **content}, Q, A) == [Q, A]
    (result,) = turns_of({"role": "tool", **content})
    assert result["content"] == (content.get("content") or "")
    with pytest.raises(InvalidRow, match="nothing but an empty turn of the system"):
        turns_of({"role": "system", **content})


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("calls", [{}, {"tool_calls": []}, {"tool_calls": None, "function_call": None}])
def test_empty_question_or_answer_costs_the_row(role: str, calls: dict[str, Any]) -> None:
    with pytest.raises(InvalidRow, match="turn 1 is empty"):
        turns_of({"role": role, "content": " ", **calls})
    with pytest.raises(InvalidRow, match="turn 1 lacks role or content"):
        turns_of({"role": role, **calls})


# Roles.


@pytest.mark.parametrize("name", [name for name, role in ROLES.items() if role != "function_call"])
def test_known_role_is_recognised_whatever_its_case_and_white_space(name: str) -> None:
    for shown in (name, name.upper(), f" {name.title()}\n"):
        assert turns_of({"role": shown, "content": "x"}) == [{"role": ROLES[name], "content": "x"}]


def test_unknown_role_is_refused_with_the_field_that_names_it(tmp_path: Path) -> None:
    record = {"messages": [{"role": "Customer", "content": "q"}, A]}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    with pytest.raises(BadSource, match="holds no row") as caught:
        check_source(Dataset(kind="dataset", source="a.jsonl"), tmp_path)
    assert "a.jsonl:1: turn 1 has the role 'Customer': say what it means with `roles`" in caught.value.cause
    (row,), _, _ = read(tmp_path, record, roles={" customer": "user"})
    assert row["messages"] == [Q, A]


def test_roles_of_the_user_go_before_the_known_ones_and_may_be_numbers() -> None:
    reader = MessageReader({"Model": "user", "0": "assistant"})
    assert reader.turns([{"role": "model", "content": "q"}, {"role": 0, "content": "a"}]) == [Q, A]


def test_keys_of_the_user_are_read_instead_of_the_usual_ones(tmp_path: Path) -> None:
    record = {"dialog": [{"speaker": "customer", "text": "q"}, {"speaker": "agent", "text": "a", "why": "because"}]}
    fields: dict[str, Any] = {
        "columns": {"messages": "dialog"},
        "roles": {"customer": "user", "agent": "assistant"},
        "message_keys": {"role": "speaker", "content": "text", "reasoning_content": "why"},
    }
    (row,), bad, ignored = read(tmp_path, record, **fields)
    assert (bad, ignored) == ([], {})
    assert row["messages"] == [Q, {**A, "reasoning_content": "because"}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("roles: {customer: human}", '`stages.rows.roles.customer` can\'t be "human"'),
        ("roles: {Bob: user, bob: user}", "the role bob has two meanings"),
        ("roles: {}", "`stages.rows.roles` can't be {}"),
        ("message_keys: {speaker: role}", "`stages.rows.message_keys"),
    ],
)
def test_wrong_roles_and_keys_are_refused_with_their_line(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(f"name: x\nseed: 1\nstages:\n  rows:\n    kind: dataset\n    source: a.jsonl\n    {line}\n")
    with pytest.raises(SpecErrors) as caught:
        load(file)
    (error,) = caught.value.errors
    assert error.line == 7
    assert message in str(error)


@pytest.mark.parametrize("field", ["roles", "message_keys"])
def test_builtin_source_has_no_roles_to_name(field: str, tmp_path: Path) -> None:
    value = {"roles": {"bob": "user"}, "message_keys": {"role": "speaker"}}[field]
    stage = Dataset(kind="dataset", source=BUILTIN, subset="questions", **{field: value})  # type: ignore[arg-type]
    with pytest.raises(BadSource, match=field):
        check_source(stage, tmp_path)


def test_role_map_of_two_meanings_is_no_dataset() -> None:
    with pytest.raises(ValidationError):
        Dataset(kind="dataset", source="a.jsonl", roles={"A": "user", " a": "assistant"})


# Calls of tools.


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
def test_arguments_of_a_call_are_an_object_where_they_can_be(arguments: Any, expected: Any) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": expected}}
    assert calls_of(tool_calls=[{"function": {"name": "f", "arguments": arguments}}]) == [call]
    assert calls_of(tool_calls={"name": "f", "arguments": arguments}) == [call]
    assert calls_of(content=None, function_call={"name": "f", "arguments": arguments}) == [call]
    (turn,) = turns_of({"from": "function_call", "value": json.dumps({"name": "f", "arguments": arguments})})
    assert json.loads(turn["tool_calls"]) == [call]


def test_result_of_a_tool_keeps_its_name_and_the_id_of_its_call() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
    calling, result = turns_of(
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "tool_call_id": "c1", "name": "f", "content": "2"},
    )
    assert json.loads(calling["tool_calls"])[0]["id"] == "c1"
    assert result == {"role": "tool", "content": "2", "name": "f", "tool_call_id": "c1"}


def test_older_form_of_calls_and_results_is_read(tmp_path: Path) -> None:
    messages = [
        Q,
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
        {"role": "function", "name": "f", "content": "2"},
        A,
    ]
    (row,), bad, ignored = read(tmp_path, {"messages": messages, "functions": [FUNCTION]})
    assert (bad, ignored) == ([], {})
    assert row["messages"][2] == {"role": "tool", "content": "2", "name": "f"}
    assert json.loads(row["tools"]) == [{"type": "function", "function": FUNCTION}]


def test_tool_without_its_wrapper_gets_one() -> None:
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
def test_multimodal_row_is_quarantined_and_a_file_of_such_rows_refused(record: dict[str, Any], tmp_path: Path) -> None:
    rows, bad, _ = read(tmp_path, record, {"messages": [Q, A]})
    assert len(rows) == 1
    assert len(bad) == 1
    assert "images, videos or audio are not supported" in bad[0]
    read(tmp_path, record, record)
    with pytest.raises(BadSource, match="holds multimodal rows") as caught:
        check_source(Dataset(kind="dataset", source="a.jsonl"), tmp_path)
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
def test_row_of_text_is_kept_whatever_its_columns_are_called(record: dict[str, Any], tmp_path: Path) -> None:
    rows, bad, _ = read(tmp_path, record)
    assert (len(rows), bad) == (1, [])


def test_named_columns_read_the_text_of_rows_with_images(tmp_path: Path) -> None:
    record = {"messages": [Q, A], "images": ["a.png"]}
    (row,), _, ignored = read(tmp_path, record, columns={"messages": "messages"})
    assert row["messages"] == [Q, A]
    assert ignored == {"images": 1}


# What nothing reads.


def test_columns_and_keys_that_nothing_reads_are_counted_by_rows(tmp_path: Path) -> None:
    rows, bad, ignored = read(
        tmp_path,
        {"messages": [{**Q, "lang": "en"}, {**A, "lang": "en"}], "topic": "x", "note": None},
        {"messages": [Q, A], "topic": "y", "note": "", "tags": []},
        {"messages": [Q, {**A, "content": ""}], "topic": "quarantined"},
        {"messages": [{"role": "system", "content": "t"}, Q, A], "system": "s"},
        {"messages": [Q, {**A, "tool_calls": [{"index": 0, "function": {"name": "f"}}]}]},
    )
    assert (len(rows), len(bad)) == (4, 1)
    assert ignored == {
        "topic": 2,
        "messages[].lang": 1,
        "messages[] of the system, beside the column of the system": 1,
        "messages[].tool_calls[].index": 1,
    }


def test_prompt_that_whole_conversations_contradict_is_counted(tmp_path: Path) -> None:
    pair = {"chosen": [Q, A], "rejected": [Q, {**A, "content": "b"}]}
    rows, _, ignored = read(tmp_path, {"prompt": "q", **pair}, {"prompt": [Q], **pair})
    assert (len(rows), ignored) == (2, {})
    rows, _, ignored = read(tmp_path, {"prompt": "another", **pair})
    assert (len(rows), ignored) == (1, {"prompt beside whole conversations": 1})


@pytest.mark.parametrize("form", ["xlsx", "csv"])
def test_cells_of_a_table_without_a_name_are_counted(form: str, tmp_path: Path) -> None:
    lines = [["question", "", "answer", ""], ["q", "note", "a", ""], ["q", "", "a", ""], ["q", "n", "a", "m"]]
    if form == "csv":
        (tmp_path / "a.csv").write_text("".join(",".join(line) + "\n" for line in lines))
    else:
        book = openpyxl.Workbook()
        for line in lines:
            book.worksheets[0].append(line)
        book.save(tmp_path / "a.xlsx")
    tally = ReadCounts()
    stage = Dataset(kind="dataset", source=f"a.{form}")
    assert len(list(read_source(stage, tmp_path, pytest.fail, tally))) == 3
    assert tally.ignored == {"(a column without a name)": 2}


def test_facts_name_the_ignored_columns_and_stay_small(tmp_path: Path) -> None:
    records = [{"text": "t", "topic": "x", f"key {number}": 1} for number in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    result, _ = make(tmp_path, "made", Dataset(kind="dataset", source="a.jsonl"))
    ignored = result.facts["ignored_columns"]
    assert ignored["topic"] == 300
    assert len(ignored) <= 101
    assert sum(ignored.values()) == 600


# Shown to a reviewer.


def without_nulls(turns: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in turn.items() if value is not None} for turn in turns]


@pytest.fixture
def full() -> list[Any]:
    return turns_of(
        {**Q, "name": "ann"},
        {**A, "content": "", "tool_calls": [{"id": "c1", "function": {"name": "f"}}], "thinking": "t", "weight": 0},
        {"role": "tool", "content": "", "name": "f", "tool_call_id": "c1"},
        {**A, "reasoning": "because", "weight": 0.5},
    )


def test_reviewer_sees_the_reasoning_and_the_calls(full: list[Any], tmp_path: Path) -> None:
    write_rows([{"id": "0" * 16, "messages": full}], tmp_path)
    (row,) = read_rows(tmp_path)
    assert without_nulls(row["messages"]) == full
    assert set(row["messages"][0]) == {"role", "content", *OPTIONAL_TURN_FIELDS}
    shown = ReviewItem("0" * 16, row, RowOutcome(True, {}, {})).messages
    assert [turn["content"] for turn in shown] == ["q", "Reasoning:\nt\n\nCalls f: {}", "", "Reasoning:\nbecause\n\na"]
    assert [turn["judged"] for turn in shown] == [False, False, False, True]
    assert set(shown[0]) == {"role", "content", "judged"}
