"""Writes the sample as an .xlsx workbook for review in a spreadsheet; decisions.py reads it back.

Cells are always text: content that begins with "=" is not a formula.
"""

from __future__ import annotations

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

from tunery.ingest.formats.excel import FORMULA_PREFIXES
from tunery.review.decisions import DECISIONS, SHEET, Decision
from tunery.review.review_items import ReviewItem
from tunery.store.atomic_write import replace_file

MAX_CELL_CHARS = 32_000
"""Excel's limit is 32,767."""
WIDTHS = {"id": 19, "prompt": 50, "response": 75, "text": 100, "rejected": 60, "decision": 12, "filter": 10}
FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""Characters that XML 1.0 cannot represent."""
LINE_HEIGHT, MAX_ROW_HEIGHT = 15, 300
"""In points; Excel's limit for a row is 409."""


def write_workbook(
    path: Path, items: Sequence[ReviewItem], decisions: Mapping[str, Decision], *, show_filter: bool
) -> None:
    """Write the sheet "review" with one line per item; `decision` is empty or the one in `decisions`.

    Without `show_filter`, the outcome of the filter and the scores are on a hidden second sheet, so that they don't
    bias the reviewer.
    """
    book = Workbook()
    sheet = book.active
    assert isinstance(sheet, Worksheet), "a new workbook has a sheet"
    sheet.title = SHEET
    texts = [_text_cells(item) for item in items]
    columns = [name for name in ("text", "prompt", "response", "rejected") if any(name in text for text in texts)]
    outcomes = [{"id": item.id, **_outcome_cells(item)} for item in items]
    extra = [name for name in (outcomes[0] if outcomes else {}) if name != "id"] if show_filter else []
    lines = [
        {"id": item.id, **text, **outcome, "decision": decisions.get(item.id)}
        for item, text, outcome in zip(items, texts, outcomes, strict=True)
    ]
    _write_sheet(sheet, ["id", *columns, *extra, "decision"], lines)
    _add_decision_choices(sheet, len(columns) + len(extra) + 2, len(items))
    if not show_filter:
        hidden = book.create_sheet("filter results")
        _write_sheet(hidden, list(outcomes[0]) if outcomes else ["id"], outcomes)
        hidden.sheet_state = "hidden"
    with replace_file(path) as temporary:
        book.save(temporary)


def _text_cells(item: ReviewItem) -> dict[str, str]:
    """Return {"text"}, or {"prompt", "response"} and, for a preference pair, {"rejected"}."""
    messages = item.messages
    if messages[0]["role"] == "text":
        return {"text": messages[0]["content"]}
    prompt = [message for message in messages if not message["judged"]] or messages
    if len(prompt) == 1:
        prompt_text = prompt[0]["content"]
    else:
        prompt_text = "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)
    judged = [message for message in messages if message["judged"] and message not in prompt]
    responses = {"response": [message for message in judged if not message["role"].startswith("rejected ")]}
    responses["rejected"] = [message for message in judged if message not in responses["response"]]
    return {"prompt": prompt_text} | {
        name: "\n\n".join(message["content"] for message in response)
        for name, response in responses.items()
        if response
    }


def _outcome_cells(item: ReviewItem) -> dict[str, Any]:
    scores = {score: value if value == value else None for score, value in item.outcome.scores.items()}
    return {"filter": "keep" if item.outcome.keep else "drop", **scores}


def _write_sheet(sheet: Worksheet, columns: Sequence[str], lines: Sequence[Mapping[str, Any]]) -> None:
    for column, name in enumerate(columns, 1):
        cell = sheet.cell(1, column)
        _write_cell(cell, name)
        cell.font = Font(bold=True, color="FFFFFF")
        cell.fill = PatternFill("solid", fgColor="3B4252")
        cell.alignment = Alignment(vertical="center")
        sheet.column_dimensions[get_column_letter(column)].width = WIDTHS.get(name, 14)
    sheet.row_dimensions[1].height = 22
    for number, line in enumerate(lines, 2):
        num_lines = 1
        for column, name in enumerate(columns, 1):
            cell, value = sheet.cell(number, column), line.get(name)
            _write_cell(cell, value)
            cell.alignment = Alignment(vertical="top", wrap_text=isinstance(value, str))
            if isinstance(value, str):
                width = WIDTHS.get(name, 14)
                num_lines = max(num_lines, sum(1 + len(part) // width for part in value.splitlines()))
            if name == "id":
                cell.font = Font(name="Consolas", size=9, color="808080")
        sheet.row_dimensions[number].height = min(MAX_ROW_HEIGHT, max(2, num_lines) * LINE_HEIGHT)
    sheet.freeze_panes = "B2"
    sheet.auto_filter.ref = f"A1:{get_column_letter(len(columns))}{len(lines) + 1}"


def _write_cell(cell: Any, value: object) -> None:
    assert isinstance(cell, Cell), "the sheet has no merged cells"
    if not isinstance(value, str):
        cell.value = value
        return
    text = FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", value)
    if len(text) > MAX_CELL_CHARS:
        text = (
            f"{text[:MAX_CELL_CHARS]}\n[cut here: {len(value):,} characters; `tunery review` without --xlsx shows all]"
        )
    cell.value = text
    cell.data_type = "s"  # openpyxl interprets text that begins with "=" as a formula
    cell.number_format = "@"  # spreadsheets interpret an id of digits as a number
    cell.quotePrefix = text.startswith(FORMULA_PREFIXES)


def _add_decision_choices(sheet: Worksheet, column: int, rows: int) -> None:
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
