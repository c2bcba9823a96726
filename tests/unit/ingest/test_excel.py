"""Excel sheets whose XML has a wrong dimension, as several programs write them."""

from __future__ import annotations

import io
import re
import time
import zipfile
from pathlib import Path
from typing import Any

import openpyxl
import pytest
from reading import read_file

from tunery.ingest.filesystem import CorruptFile, local_file
from tunery.ingest.formats import excel
from tunery.ingest.formats.excel import MAX_COLUMNS
from tunery.ingest.formats.excel import workbook as open_workbook
from tunery.review.decisions import read_decisions
from tunery.spec import Dataset


def workbook(path: Path, lines: list[list[Any]], dimension: str, title: str = "Sheet", merged: str = "") -> None:
    """Write a workbook whose first sheet has the given <dimension>, or none if it is ""."""
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.title = title
    for line in lines:
        sheet.append(line)
    if merged:
        sheet.merge_cells(merged)
    saved = io.BytesIO()
    book.save(saved)
    element = f'<dimension ref="{dimension}"/>'.encode() if dimension else b""
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            if name.endswith("sheet1.xml"):
                content, count = re.subn(rb"<dimension [^>]*>(</dimension>)?", element, content)
                assert count == 1
            target.writestr(name, content)


DIMENSIONS = ["A1:B51", "A1:B10", "A1", "A1:A51", "B3:B10", "A1:B1048576", "A1:XFD51", ""]


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_all_rows_of_a_sheet_are_read_despite_a_wrong_dimension(dimension: str, tmp_path: Path) -> None:
    workbook(tmp_path / "a.xlsx", [["question", "answer"], *([f"q{n}", f"a{n}"] for n in range(50))], dimension)
    rows, quarantined = read_file(tmp_path, "a.xlsx")
    assert not quarantined
    assert [row["messages"][1]["content"] for row in rows] == [f"a{n}" for n in range(50)]
    assert [row["line"] for row in rows] == list(range(2, 52))


@pytest.mark.parametrize("dimension", ["A1:B2", ""])
def test_decisions_are_read_beyond_a_wrong_dimension(dimension: str, tmp_path: Path) -> None:
    lines = [["id", "decision"], ["a", "keep"], ["b", "drop"], ["c", None], ["d", "keep"]]
    workbook(tmp_path / "a.xlsx", lines, dimension, title="review")
    assert read_decisions(tmp_path / "a.xlsx") == {"a": "keep", "b": "drop", "d": "keep"}


@pytest.mark.parametrize("dimension", ["A1:B2", ""])
def test_short_row_has_missing_cells_and_is_not_read_as_another_format(dimension: str, tmp_path: Path) -> None:
    lines = [["prompt", "completion"], ["q1", "a1"], ["q2"], ["q3", "a3"]]
    workbook(tmp_path / "a.xlsx", lines, dimension)
    rows, quarantined = read_file(tmp_path, "a.xlsx")
    assert [row["line"] for row in rows] == [2, 4]
    assert [(line.line, line.reason) for line in quarantined] == [(3, "response is missing")]


@pytest.mark.parametrize("dimension", ["A1:B2", ""])
def test_value_merged_over_rows_applies_to_rows_without_the_cells(dimension: str, tmp_path: Path) -> None:
    lines = [["question", "answer"], ["q1", "a"], ["q2"], ["q3"]]
    workbook(tmp_path / "a.xlsx", lines, dimension, merged="B2:B4")
    rows, quarantined = read_file(tmp_path, "a.xlsx")
    assert not quarantined
    assert [row["messages"][1]["content"] for row in rows] == ["a", "a", "a"]


@pytest.mark.parametrize("dimension", ["A1:B2", ""])
def test_formula_without_a_cached_value_beyond_a_wrong_dimension_makes_its_row_invalid(
    dimension: str, tmp_path: Path
) -> None:
    workbook(tmp_path / "a.xlsx", [["question", "answer"], ["q1", "a1"], ["q2", "a2"], ["q3", "=1+1"]], dimension)
    rows, quarantined = read_file(tmp_path, "a.xlsx")
    assert len(rows) == 2
    assert [(line.line, "the formula in B4 has no cached value" in line.reason) for line in quarantined] == [(4, True)]


def test_wide_and_long_sheet_is_read_in_seconds(tmp_path: Path) -> None:
    """A small file with 2,001 columns and a million rows, nearly all of them absent."""
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.append(["text", *(f"column {n}" for n in range(2_000))])
    sheet["A2"], sheet["A1048576"] = "first", "last"
    book.save(tmp_path / "a.xlsx")
    assert (tmp_path / "a.xlsx").stat().st_size < 50_000
    started = time.monotonic()
    rows, quarantined = read_file(tmp_path, "a.xlsx")
    assert time.monotonic() - started < 30
    assert not quarantined
    assert [(row["text"], row["line"]) for row in rows] == [("first", 2), ("last", 1_048_576)]


def test_sheet_with_too_many_columns_is_reported(tmp_path: Path) -> None:
    workbook(tmp_path / "a.xlsx", [["text", *(f"c{n}" for n in range(MAX_COLUMNS))], ["a"]], "")
    with pytest.raises(CorruptFile, match="header has 2,049 columns, at most 2,048"):
        list(open_workbook(local_file(tmp_path / "a.xlsx", tmp_path), Dataset(kind="dataset", source="a.xlsx")))


def test_workbook_that_unpacks_to_too_much_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workbook(tmp_path / "a.xlsx", [["text"], ["a" * 10_000]], "")
    monkeypatch.setattr(excel, "MAX_UNPACKED_BYTES", 10_000)
    with pytest.raises(CorruptFile, match="bytes unpacked, at most 10,000 are read"):
        list(open_workbook(local_file(tmp_path / "a.xlsx", tmp_path), Dataset(kind="dataset", source="a.xlsx")))
