"""The sample as an .xlsx workbook, for who would rather decide in a spreadsheet. decisions.py reads it back.

Cells hold text and nothing else: a row that begins with "=" stays a text and is no formula.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from openpyxl import Workbook
from openpyxl.cell import Cell
from openpyxl.formatting.rule import CellIsRule
from openpyxl.styles import Alignment, Font, PatternFill, Protection
from openpyxl.utils import get_column_letter
from openpyxl.worksheet.datavalidation import DataValidation
from openpyxl.worksheet.worksheet import Worksheet

from tunery.review.decisions import DECISIONS, SHEET, Decision
from tunery.review.review_items import ReviewItem

LONGEST = 32_000
"""Characters in a cell; Excel takes 32,767."""
WIDTHS = {"id": 19, "question": 50, "answer": 75, "text": 100, "rejected": 60, "decision": 12, "filter": 10}
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""What XML 1.0 has no way to write."""
LINE, TALLEST = 15, 300
"""Height in points, of a line of text and of a row at most (Excel ends at 409)."""


def write_workbook(
    path: Path, rows: Sequence[ReviewItem], decided: Mapping[str, Decision], *, show_filter: bool
) -> None:
    """Sheet "review": a row each with an empty `decision`, or the one in `decided`.

    Without `show_filter` verdict and scores are on a second sheet that is hidden, so that they lead nobody.
    """
    book = Workbook()
    sheet = book.active
    assert isinstance(sheet, Worksheet), "a new workbook has one"
    sheet.title = SHEET
    texts = [_texts(item) for item in rows]
    columns = [name for name in ("text", "question", "answer", "rejected") if any(name in text for text in texts)]
    told = [{"id": item.id, **_verdict(item)} for item in rows]
    extra = [name for name in (told[0] if told else {}) if name != "id"] if show_filter else []
    lines = [
        {"id": item.id, **text, **verdict, "decision": decided.get(item.id)}
        for item, text, verdict in zip(rows, texts, told, strict=True)
    ]
    _fill(sheet, ["id", *columns, *extra, "decision"], lines)
    _offer_decisions(sheet, len(columns) + len(extra) + 2, len(rows))
    if not show_filter:
        hidden = book.create_sheet("filter, for afterwards")
        _fill(hidden, list(told[0]) if told else ["id"], told)
        hidden.sheet_state = "hidden"
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    book.save(aside)
    aside.replace(path)


def _texts(item: ReviewItem) -> dict[str, str]:
    """{"text"}, or {"question", "answer"} and, of a pair, {"rejected"}."""
    turns = item.turns
    if turns[0]["role"] == "text":
        return {"text": turns[0]["content"]}
    asked = [turn for turn in turns if not turn["judged"]] or turns
    question = asked[0]["content"] if len(asked) == 1 else "\n\n".join(f"{t['role']}: {t['content']}" for t in asked)
    judged = [turn for turn in turns if turn["judged"] and turn not in asked]
    answers = {"answer": [t for t in judged if not t["role"].startswith("rejected ")]}
    answers["rejected"] = [turn for turn in judged if turn not in answers["answer"]]
    return {"question": question} | {
        name: "\n\n".join(turn["content"] for turn in found) for name, found in answers.items() if found
    }


def _verdict(item: ReviewItem) -> dict[str, Any]:
    scores = {score: value if value == value else None for score, value in item.verdict.scores.items()}
    return {"filter": "keep" if item.verdict.keep else "drop", **scores}


def _fill(sheet: Worksheet, columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> None:
    for place, name in enumerate(columns, 1):
        cell = sheet.cell(1, place)
        _write(cell, name)
        cell.font = Font(bold=True, color="FFFFFF")
        cell.fill = PatternFill("solid", fgColor="3B4252")
        cell.alignment = Alignment(vertical="center")
        sheet.column_dimensions[get_column_letter(place)].width = WIDTHS.get(name, 14)
    sheet.row_dimensions[1].height = 22
    for number, line in enumerate(lines, 2):
        tallest = 1
        for place, name in enumerate(columns, 1):
            cell, value = sheet.cell(number, place), line.get(name)
            _write(cell, value)
            cell.alignment = Alignment(vertical="top", wrap_text=isinstance(value, str))
            if isinstance(value, str):
                width = WIDTHS.get(name, 14)
                tallest = max(tallest, sum(1 + len(part) // width for part in value.splitlines()))
            if name == "id":
                cell.font = Font(name="Consolas", size=9, color="808080")
        sheet.row_dimensions[number].height = min(TALLEST, max(2, tallest) * LINE)
    sheet.freeze_panes = "B2"
    sheet.auto_filter.ref = f"A1:{get_column_letter(len(columns))}{len(lines) + 1}"


def _write(cell: Any, value: object) -> None:
    assert isinstance(cell, Cell), "not merged"
    if not isinstance(value, str):
        cell.value = value
        return
    text = FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value)
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}\n[cut here: {len(value):,} characters; `tunery review` without --xlsx shows all]"
    cell.value = text
    cell.data_type = "s"  # openpyxl takes what begins with "=" for a formula ...
    cell.number_format = "@"  # ... and a spreadsheet takes an id of digits for a number
    cell.quotePrefix = text.startswith(("=", "+", "-", "@"))


def _offer_decisions(sheet: Worksheet, column: int, rows: int) -> None:
    letter = get_column_letter(column)
    cells = f"{letter}2:{letter}{rows + 1}"
    choice = DataValidation(type="list", formula1=f'"{",".join(DECISIONS)}"', allow_blank=True)
    choice.errorTitle, choice.error = "No decision", "Write keep or drop, or leave the cell empty."
    choice.promptTitle, choice.prompt = "Decision", "keep or drop; empty: not decided"
    choice.showErrorMessage = choice.showInputMessage = True
    sheet.add_data_validation(choice)
    choice.add(cells)
    for decision, colour in zip(DECISIONS, ("D5EAD9", "F3D5D0"), strict=True):
        sheet.conditional_formatting.add(
            cells, CellIsRule(operator="equal", formula=[f'"{decision}"'], fill=PatternFill("solid", bgColor=colour))
        )
    for number in range(2, rows + 2):
        sheet.cell(number, column).protection = Protection(locked=False)
