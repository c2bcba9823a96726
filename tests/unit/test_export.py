"""Rows that leave tunery come back as they were, in every format and shape."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import openpyxl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tunery.data.export as export
from tunery.data.export import ENDINGS, export_dropped, export_kept
from tunery.data.read import read_source
from tunery.errors import RequestError, StageError, TuneryError
from tunery.spec import Dataset
from tunery.store.rows import SHARD, Row, read_rows, row_id, shards, write_rows
from tunery.store.vectors import vector_column

USER = {"role": "user", "content": 'Was ist "Ä"?\nZeile zwei, mit Komma'}
ANSWER = {"role": "assistant", "content": "Ein Buchstabe.\n\n=1+1"}
WORSE = {"role": "assistant", "content": "-nichts"}
SYSTEM = {"role": "system", "content": "Sei kurz."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": '[{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]',
}
TOOLS = '[{"type": "function", "function": {"name": "f"}}]'
SHAPES: dict[str, tuple[list[Row], list[str]]] = {
    "text": ([{"text": "=cmd()"}, {"text": "two\nlines"}], ["text"]),
    "pair": ([{"messages": [USER, ANSWER]}, {"messages": [SYSTEM, USER, WORSE]}], ["system", "prompt", "completion"]),
    "conversation": ([{"messages": [USER, ANSWER, USER, WORSE]}, {"messages": [USER, ANSWER]}], ["messages"]),
    "tools": (
        [{"messages": [USER, CALL, {"role": "tool", "content": "2"}, ANSWER], "tools": TOOLS}] * 2,
        ["messages", "tools"],
    ),
    "preference": ([{"messages": [USER, ANSWER], "rejected": [WORSE]}] * 2, ["prompt", "chosen", "rejected"]),
    "long preference": (
        [{"messages": [USER, WORSE, USER, ANSWER], "rejected": [WORSE]}] * 2,
        ["messages", "chosen", "rejected"],
    ),
    "preference with calls": ([{"messages": [USER, CALL], "rejected": [WORSE]}], ["messages", "chosen", "rejected"]),
    "rated": (
        [{"messages": [USER, ANSWER], "label": True}, {"messages": [USER, WORSE], "label": False}],
        ["prompt", "completion", "label"],
    ),
    "prompt": ([{"messages": [USER]}, {"messages": [SYSTEM, USER]}], ["system", "prompt"]),
}


def artifacts(folder: Path, rows: list[Row], dropped: set[int], scores: dict[str, Any] | None = None) -> list[Path]:
    """[selection, filtered], as far as an export reads them."""
    selection, filtered = folder / "select", folder / "score"
    filled = [
        {**row, "id": row_id({"text": None, "messages": None, "rejected": None, **row}), "source": "in.csv", "line": n}
        for n, row in enumerate(rows, 2)
    ]
    write_rows(filled, filtered)
    (filtered / "scores").mkdir()
    start = 0
    for path in shards(filtered):
        size = pq.read_metadata(path).num_rows
        piece = {name: values[start : start + size] for name, values in (scores or {}).items()}
        ids = [row["id"] for row in filled[start : start + size]]
        pq.write_table(pa.table({"id": ids, **piece}), filtered / "scores" / path.name)
        start += size
    selection.mkdir()
    lines = [{k: filled[n][k] for k in ("id", "source", "line")} | {"rule": f"rule {n}"} for n in sorted(dropped)]
    (selection / "dropped.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return [selection, filtered]


def read_back(path: Path) -> list[Row]:
    found: list[Any] = []
    stage = Dataset.model_validate({"kind": "dataset", "source": path.name})
    rows = list(read_source(stage, path.parent, found.append))
    assert not found
    return rows


@pytest.mark.parametrize(
    ("shape", "ending"),
    [
        (shape, ending)
        for shape in SHAPES
        for ending in (".jsonl", ".xlsx", ".parquet")
        # A table's cell is text, and an answer's text is the answer: turns can't be told from it.
        if (shape, ending) != ("preference with calls", ".xlsx")
    ],
)
def test_what_is_written_is_read_back_as_the_same_rows(tmp_path: Path, shape: str, ending: str) -> None:
    rows, _ = SHAPES[shape]
    selection, filtered = artifacts(tmp_path, rows, set(), {"length": [1.0, math.nan][: len(rows)]})
    out = tmp_path / f"good{ending}"
    assert export_kept(selection, filtered, out).rows == len(rows)
    expected = [row["id"] for row in read_rows(filtered)]
    assert [row_id(row) for row in read_back(out)] == expected


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "calls" not in shape])
def test_csv_has_the_shapes_columns_and_keeps_its_texts_but_for_the_guard(tmp_path: Path, shape: str) -> None:
    rows, columns = SHAPES[shape]
    selection, filtered = artifacts(tmp_path, rows, set(), {"length": [1.0, math.nan], "length_question": [2.0, 3.0]})
    written = export_kept(selection, filtered, tmp_path / "good.csv")
    with (tmp_path / "good.csv").open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.DictReader(file))
    assert list(lines[0]) == [*columns, "id", "source", "line", "length", "length_question"]
    assert [line["length"] for line in lines] == ["1.0", ""]
    guarded = [value for line in lines for value in line.values() if value.startswith("'")]
    assert len(guarded) == written.guarded
    assert not any(value.startswith(("=", "+", "-", "@")) for line in lines for value in line.values())
    (tmp_path / "plain.csv").write_text(
        (tmp_path / "good.csv").read_text("utf-8-sig").replace("'=", "=").replace("'-", "-")
    )
    assert [row_id(row) for row in read_back(tmp_path / "plain.csv")] == [row["id"] for row in read_rows(filtered)]


def test_no_text_of_a_workbook_is_a_formula_or_a_number(tmp_path: Path) -> None:
    texts = ["=1+1", "+1", "-1", "@SUM(A1)", "12e4", "\x01bell"]
    selection, filtered = artifacts(tmp_path, [{"text": text} for text in texts], set(), {"length": [-1.5] * 6})
    written = export_kept(selection, filtered, tmp_path / "good.xlsx")
    sheet = openpyxl.load_workbook(tmp_path / "good.xlsx").active
    cells = [row[0] for row in sheet.iter_rows(min_row=2)]
    assert [cell.value for cell in cells] == [*texts[:5], "\N{REPLACEMENT CHARACTER}bell"]
    assert {cell.data_type for cell in cells} == {"s"}
    assert [cell.quotePrefix for cell in cells] == [True] * 4 + [False] * 2
    assert {row[4].value for row in sheet.iter_rows(min_row=2)} == {-1.5}, "scores are numbers, and stay them"
    assert written.replaced == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_kept_and_dropped_rows_are_all_rows_each_with_its_scores_and_rule(tmp_path: Path, ending: str) -> None:
    count = SHARD + 50  # two shards; every content is there twice
    rows = [{"text": f"row {n // 2}"} for n in range(count)]
    dropped = {n for n in range(count) if n % 7 == 0 or n > SHARD + 40}
    selection, filtered = artifacts(tmp_path, rows, dropped, {"length": [float(n) for n in range(count)]})
    good, bad = tmp_path / f"good{ending}", tmp_path / f"bad{ending}"
    export_kept(selection, filtered, good)
    export_dropped(selection, filtered, bad)
    assert [int(float(row["length"])) for row in _lines(good)] == [n for n in range(count) if n not in dropped]
    assert [(int(float(row["length"])), row["rule"]) for row in _lines(bad)] == [
        (n, f"rule {n}") for n in sorted(dropped)
    ]
    assert "rule" not in _lines(good)[0]


def _lines(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".csv":
        return list(csv.DictReader(path.read_text("utf-8-sig").splitlines()))
    if path.suffix == ".parquet":
        return list(pq.read_table(path).to_pylist())
    header, *rows = openpyxl.load_workbook(path).active.iter_rows(values_only=True)
    return [dict(zip(header, row, strict=True)) for row in rows]


def test_shapes_may_be_mixed_where_a_line_has_columns_of_its_own(tmp_path: Path) -> None:
    rows = [row for name in ("text", "pair", "preference", "rated") for row in SHAPES[name][0]]
    selection, filtered = artifacts(tmp_path, rows, set())
    export_kept(selection, filtered, tmp_path / "good.jsonl")
    assert [row_id(row) for row in read_back(tmp_path / "good.jsonl")] == [row["id"] for row in read_rows(filtered)]


@pytest.mark.parametrize("ending", ENDINGS)
def test_vectors_are_left_out(tmp_path: Path, ending: str) -> None:
    vectors = vector_column(np.ones((2, 3), np.float16))
    scores = {"length": [1.0, 2.0], "embedding_vector": vectors}
    selection, filtered = artifacts(tmp_path, [{"text": "a"}, {"text": "b"}], set(), scores)
    export_kept(selection, filtered, tmp_path / f"good{ending}")
    assert [list(row) for row in _lines(tmp_path / f"good{ending}")] == [["text", "id", "source", "line", "length"]] * 2


def test_rows_without_scores_are_exported_too(tmp_path: Path) -> None:
    selection, filtered = artifacts(tmp_path, [{"text": "a"}, {"text": "b"}], {0})
    for path in (filtered / "scores").iterdir():
        path.unlink()
    export_kept(selection, filtered, tmp_path / "good.jsonl")
    assert [(row["text"], row["line"]) for row in _lines(tmp_path / "good.jsonl")] == [("b", 3)]


def test_a_workbook_that_can_not_hold_all_is_refused_with_a_remedy_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SHEET_ROWS", 2)
    selection, filtered = artifacts(tmp_path, [{"text": "a"}, {"text": "b"}, {"text": "c"}], set())
    out = tmp_path / "good.xlsx"
    out.write_text("an earlier one")
    with pytest.raises(RequestError, match="3 rows don't fit") as caught:
        export_kept(selection, filtered, out)
    assert "good.parquet" in caught.value.remedy
    monkeypatch.setattr(export, "SHEET_ROWS", 1_048_575)
    selection, filtered = artifacts(tmp_path / "long", [{"text": "a" * 32_768}], set())
    with pytest.raises(RequestError, match="32,768 characters") as caught:
        export_kept(selection, filtered, out)
    assert ".parquet" in caught.value.remedy
    assert out.read_text() == "an earlier one"
    assert not list(tmp_path.glob(".good*"))


def test_a_list_of_dropped_rows_that_is_not_of_these_rows_is_found_out(tmp_path: Path) -> None:
    selection, filtered = artifacts(tmp_path, [{"text": "a"}, {"text": "b"}], {1})
    (selection / "dropped.jsonl").write_text('{"id": "0", "source": "other", "line": 1, "rule": "x"}\n')
    with pytest.raises(StageError, match="names a row"):
        export_kept(selection, filtered, tmp_path / "good.jsonl")


def test_a_place_that_can_not_be_written_is_an_error_with_a_remedy(tmp_path: Path) -> None:
    selection, filtered = artifacts(tmp_path, [{"text": "a"}], set())
    (tmp_path / "file").write_text("")
    with pytest.raises(TuneryError, match="can't be written") as caught:
        export_kept(selection, filtered, tmp_path / "file" / "good.csv")
    assert (caught.value.exit_code, caught.value.remedy[:9]) == (1, "make room")
