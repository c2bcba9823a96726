"""CSV files whose first line sets the delimiter for Excel: `sep=;`."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import read_file


@pytest.mark.parametrize("delimiter", [";", ",", "\t", "|", "^", "~", "§"])
@pytest.mark.parametrize("hint", ["sep={}", "SEP={}", '"sep={}"', "sep={}{}", "\ufeffsep={}"])
@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_first_line_may_set_the_delimiter(delimiter: str, hint: str, ending: str, tmp_path: Path) -> None:
    lines = [
        hint.format(delimiter, delimiter),
        *(f"{q}{delimiter}{a}" for q, a in (("question", "answer"), ("q", "a,;"))),
    ]
    if delimiter in ",;":
        lines[-1] = f'q{delimiter}"a,;"'
    (tmp_path / f"a.{ending}").write_text("\r\n".join(lines) + "\r\n", encoding="utf-8")
    (row,), quarantined = read_file(tmp_path, f"a.{ending}")
    assert not quarantined
    assert [message["content"] for message in row["messages"]] == ["q", "a,;"]
    assert row["line"] == 3


def test_line_numbers_below_the_hint_are_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('sep=;\n\nquestion;answer\nq;"two\nlines"\nq;\nq;a\n')
    rows, quarantined = read_file(tmp_path, "a.csv")
    assert [row["line"] for row in rows] == [4, 7]
    assert [(line.line, line.reason) for line in quarantined] == [(6, "response is missing")]


@pytest.mark.parametrize(
    "content", ["question;answer\nq;sep=,\n", "question\tanswer\nq\tsep=,\n", "question|answer\nq|sep=,\n"]
)
def test_delimiter_is_detected_from_the_header_otherwise(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(content)
    (row,), quarantined = read_file(tmp_path, "a.csv")
    assert not quarantined
    assert row["messages"][1]["content"] == "sep=,"
