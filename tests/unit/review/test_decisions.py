"""Decisions on disk: they are read back unchanged, and an invalid decision is an error with its location."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openpyxl import Workbook, load_workbook

from tunery.review.decisions import BadDecisions, DecisionLog, read_decisions, replay
from tunery.review.review_items import ReviewItem, RowOutcome
from tunery.review.workbook import MAX_CELL_CHARS, write_workbook

# JSON lines.


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_last_decision_of_a_row_counts_and_null_revokes_it(tmp_path: Path) -> None:
    path = write(
        tmp_path / "d.jsonl",
        '\ufeff{"id": "a", "decision": "keep", "t": 1, "who": "me"}',
        '{"id": "b", "decision": "drop"}',
        "",
        '{"id": "a", "decision": "drop"}\r',
        '{"id": "b", "decision": null}',
    )
    assert read_decisions(path) == {"a": "drop"}


def test_missing_file_has_no_decisions(tmp_path: Path) -> None:
    assert read_decisions(tmp_path / "no" / "d.jsonl") == {}
    assert read_decisions(tmp_path / "no.xlsx") == {}


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "a", "decision": "maybe"}',
        '{"id": "a", "decision": "Keep"}',
        '{"id": "a"}',
        '{"id": 7, "decision": "keep"}',
        '{"id": "", "decision": "keep"}',
        '{"id": "a", "decision": ["keep"]}',
        '["a", "keep"]',
        '"keep"',
        "keep a",
        "null",
    ],
)
def test_invalid_line_is_reported_with_its_number(line: str, tmp_path: Path) -> None:
    path = write(tmp_path / "d.jsonl", '{"id": "b", "decision": "keep"}', line)
    with pytest.raises(BadDecisions) as caught:
        read_decisions(path)
    assert f"{path}:2: `{line}` is not a decision" in caught.value.message
    assert caught.value.remedy


def test_partial_last_line_is_ignored_and_truncated(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"id": "a", "decision": "keep"}\n{"id": "b", "deci')
    assert read_decisions(path) == {"a": "keep"}
    log = DecisionLog(path)
    log.decide("c", "drop")
    log.close()
    assert read_decisions(path) == {"a": "keep", "c": "drop"}


def test_decision_file_cannot_be_opened_twice(tmp_path: Path) -> None:
    log = DecisionLog(tmp_path / "d.jsonl")
    with pytest.raises(BadDecisions, match="another `tunery review`"):
        DecisionLog(tmp_path / "d.jsonl")
    log.close()
    DecisionLog(tmp_path / "d.jsonl").close()


def test_unwritable_decision_file_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadDecisions, match="can't be written"):
        DecisionLog(tmp_path / "file" / "d.jsonl")


STEPS = st.lists(st.tuples(st.sampled_from(["keep", "drop", "undo"]), st.sampled_from("abc")), max_size=30)


@given(STEPS, st.integers(0, 30))
def test_undo_reverts_one_decision_at_a_time_also_after_a_restart(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, str]], restart_at: int
) -> None:
    path = tmp_path_factory.mktemp("log") / "d.jsonl"
    log = DecisionLog(path)
    history: list[dict[str, str]] = [{}]
    for number, (action, id) in enumerate(steps):
        if number == restart_at:
            log.close()
            log = DecisionLog(path)
        if action == "undo":
            undone = log.undo()
            assert (undone is None) == (len(history) == 1)
            history = history[:-1] or history
        else:
            log.decide(id, action)  # type: ignore[arg-type]
            history.append({**history[-1], id: action})
        assert log.decisions == history[-1]
        assert read_decisions(path) == history[-1]
    log.close()
    assert replay(path, path.read_bytes())[0] == history[-1]


def test_failed_write_leaves_no_partial_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = DecisionLog(tmp_path / "d.jsonl")
    log.decide("a", "keep")
    write_all = os.write

    def write_part(file: int, data: Any) -> int:
        write_all(file, bytes(data)[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", write_part)
    for action in (lambda: log.decide("b", "drop"), log.undo):
        with pytest.raises(OSError, match="No space"):
            action()
    monkeypatch.undo()
    assert log.decisions == {"a": "keep"}
    log.decide("c", "drop")
    log.close()
    assert read_decisions(tmp_path / "d.jsonl") == {"a": "keep", "c": "drop"}


def test_decision_is_synced_when_decide_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = DecisionLog(tmp_path / "d.jsonl")
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    log.decide("a", "keep")
    assert synced == [(tmp_path / "d.jsonl").stat().st_size]
    (line,) = (json.loads(line) for line in (tmp_path / "d.jsonl").read_text().splitlines())
    assert (line["id"], line["decision"]) == ("a", "keep")
    assert line["t"].startswith("20")
    log.close()


# Workbooks.


def item(id: str, question: str, response: str, keep: bool = True, score: float = 3.5) -> ReviewItem:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": response}]
    return ReviewItem(
        id, {"text": None, "messages": messages, "rejected": None}, RowOutcome(keep, {"perplexity": score}, {})
    )


FORMULAS = ['=HYPERLINK("http://x","y")', "+1", "@SUM(1)", "-2", "\n=1", "\t=1", "＝1+1", "＠SUM(1)"]
HOSTILE = ['=HYPERLINK("http://x","y")', "+1", "@SUM(1)", "-2", "a\x00\x1b[31mred\x07", "x" * 50_000]


def test_workbook_decisions_are_read_back(tmp_path: Path) -> None:
    path = tmp_path / "w.xlsx"
    rows = [item(f"{n:016d}", text, text) for n, text in enumerate(HOSTILE)]
    write_workbook(path, rows, {"0000000000000001": "drop"}, show_filter=False)
    assert read_decisions(path) == {"0000000000000001": "drop"}, "ids that have only digits stay text"
    book = load_workbook(path)
    sheet = book["review"]
    header = [cell.value for cell in sheet[1]]
    assert header == ["id", "prompt", "response", "decision"]
    for number, line in ((2, "keep"), (3, None), (4, " DROP "), (7, "Keep")):
        sheet.cell(number, 4).value = line
    book.save(path)
    assert read_decisions(path) == {
        "0000000000000000": "keep",
        "0000000000000002": "drop",
        "0000000000000005": "keep",
    }


def test_text_that_looks_like_a_formula_stays_text(tmp_path: Path) -> None:
    write_workbook(tmp_path / "w.xlsx", [item("a", text, text) for text in FORMULAS], {}, show_filter=True)
    sheet = load_workbook(tmp_path / "w.xlsx")["review"]
    for number, text in enumerate(FORMULAS, 2):
        for column in (2, 3):
            cell = sheet.cell(number, column)
            assert (cell.value, cell.data_type, cell.quotePrefix) == (text, "s", True)


def test_long_cell_text_is_truncated_with_a_note_and_controls_are_replaced(tmp_path: Path) -> None:
    write_workbook(tmp_path / "w.xlsx", [item("a", HOSTILE[4], "x" * 50_000)], {}, show_filter=False)
    sheet = load_workbook(tmp_path / "w.xlsx")["review"]
    assert sheet["B2"].value == "a\ufffd\ufffd[31mred\ufffd"
    assert sheet["C2"].value.startswith("x" * MAX_CELL_CHARS + "\n[cut here: 50,000 characters")
    assert len(sheet["C2"].value) < 32_767


def test_workbook_has_a_choice_of_decisions_and_a_readable_layout(tmp_path: Path) -> None:
    write_workbook(tmp_path / "w.xlsx", [item("a", "Why?", "Because.\n" * 40)] * 3, {}, show_filter=False)
    sheet = load_workbook(tmp_path / "w.xlsx")["review"]
    (choice,) = sheet.data_validations.dataValidation
    assert (choice.type, choice.formula1, str(choice.sqref)) == ("list", '"keep,drop"', "D2:D4")
    assert sheet.freeze_panes == "B2"
    assert sheet["C2"].alignment.wrap_text
    assert sheet.column_dimensions["C"].width > 50
    assert 200 < sheet.row_dimensions[2].height <= 409


def test_filter_results_are_hidden_unless_requested(tmp_path: Path) -> None:
    rows = [item("a", "q", "r", keep=False), item("b", "q", "r", score=float("nan"))]
    write_workbook(tmp_path / "hidden.xlsx", rows, {}, show_filter=False)
    book = load_workbook(tmp_path / "hidden.xlsx")
    assert [cell.value for cell in book["review"][1]] == ["id", "prompt", "response", "decision"]
    assert book.worksheets[1].sheet_state == "hidden"
    assert [[cell.value for cell in row] for row in book.worksheets[1]] == [
        ["id", "filter", "perplexity"],
        ["a", "drop", 3.5],
        ["b", "keep", None],
    ]
    write_workbook(tmp_path / "shown.xlsx", rows, {}, show_filter=True)
    book = load_workbook(tmp_path / "shown.xlsx")
    assert [cell.value for cell in book["review"][1]] == [
        "id",
        "prompt",
        "response",
        "filter",
        "perplexity",
        "decision",
    ]
    assert len(book.worksheets) == 1


def test_texts_conversations_and_pairs_have_their_columns(tmp_path: Path) -> None:
    user, assistant = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    outcome = RowOutcome(True, {}, {})
    rows = [
        ReviewItem("1", {"text": "t", "messages": None, "rejected": None}, outcome),
        ReviewItem("2", {"text": None, "messages": [user, assistant, user, assistant], "rejected": None}, outcome),
        ReviewItem("3", {"text": None, "messages": [user, assistant], "rejected": [assistant]}, outcome),
        ReviewItem("4", {"text": None, "messages": [user], "rejected": None}, outcome),
    ]
    write_workbook(tmp_path / "w.xlsx", rows, {}, show_filter=False)
    actual = [[cell.value for cell in row] for row in load_workbook(tmp_path / "w.xlsx")["review"]]
    assert actual == [
        ["id", "text", "prompt", "response", "rejected", "decision"],
        ["1", "t", None, None, None, None],
        ["2", None, "user: q\n\nassistant: a\n\nuser: q", "a", None, None],
        ["3", None, "q", "a", "a", None],
        ["4", None, "q", None, None, None],
    ]


def sheet_of(path: Path, rows: list[list[Any]], title: str = "review") -> Path:
    book = Workbook()
    book.active.title = title
    for row in rows:
        book.active.append(row)
    book.save(path)
    return path


INVALID_WORKBOOKS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "no decision": (
        lambda path: sheet_of(path, [["id", "decision"], ["a", "keep"], ["b", "perhaps"]]),
        ["sheet `review`, row 3: `perhaps` is not a decision", "keep or drop"],
    ),
    "no id": (
        lambda path: sheet_of(path, [["id", "decision"], [None, "keep"]]),
        ["row 2: `None` is not a row id"],
    ),
    "id that became a number": (
        lambda path: sheet_of(path, [["id", "decision"], [1234567890123456, "keep"]]),
        ["row 2: `1234567890123456` is not a row id", "to numbers"],
    ),
    "two decisions": (
        lambda path: sheet_of(path, [["id", "decision"], ["a", "keep"], ["a", "drop"]]),
        ["row 3: `drop` contradicts `keep` above, for the row a"],
    ),
    "missing column": (
        lambda path: sheet_of(path, [["id", "outcome"]], "other"),
        ["sheet `other`, row 1: there is no column `decision`", "id, outcome"],
    ),
    "empty": (lambda path: sheet_of(path, []), ["no column `id`", "its columns are: none"]),
    "no workbook": (lambda path: write(path, "id,decision"), ["is not an .xlsx workbook"]),
}


@pytest.mark.parametrize("case", INVALID_WORKBOOKS)
def test_invalid_workbook_is_reported_with_sheet_row_and_value(case: str, tmp_path: Path) -> None:
    create, expected = INVALID_WORKBOOKS[case]
    path = create(tmp_path / "d.xlsx")
    with pytest.raises(BadDecisions) as caught:
        read_decisions(path)
    assert str(path) in str(caught.value)
    for words in expected:
        assert words in str(caught.value)


def test_workbook_columns_may_be_reordered_and_added(tmp_path: Path) -> None:
    rows = [["note", "Decision", "x", "ID"], [None, "keep", 1, "a"], [], ["n", None, None, "b"]]
    assert read_decisions(sheet_of(tmp_path / "d.xlsx", rows, "Sheet1")) == {"a": "keep"}
