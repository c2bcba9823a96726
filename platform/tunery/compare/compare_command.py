"""`tunery compare`: metrics, fields and rows of two sides, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from tunery.compare.fields import Fields, compare_fields
from tunery.compare.row_sets import RowsCompared, RowSetStats, compare_rows
from tunery.compare.side_metrics import Measured, Metric, compare_metrics
from tunery.compare.sides import RunSelection, side
from tunery.events.formatting import count, measure, with_half
from tunery.store import Store

LONGEST = 120
"""Characters of a field's value that are shown."""


@dataclass(frozen=True)
class Compared:
    left: RunSelection
    right: RunSelection
    metrics: list[Metric]
    fields: Fields
    rows: list[RowsCompared]
    notes: list[str]

    @property
    def names(self) -> tuple[str, str]:
        """Of the columns: without the run where it is the same one."""
        sides = (self.left, self.right)
        if self.left.recorded.folder != self.right.recorded.folder:
            return self.left.name, self.right.name
        one, other = (side.trial.name if side.trial is not None else "file" for side in sides)
        return one, other

    def as_json(self) -> dict[str, Any]:
        return {
            **{
                name: {
                    "run": side.run,
                    "trial": side.trial.name if side.trial is not None else None,
                    "overrides": side.trial.overrides if side.trial is not None else {},
                }
                for name, side in (("left", self.left), ("right", self.right))
            },
            "metrics": [metric.as_json() for metric in self.metrics],
            "fields": asdict(self.fields),
            "rows": [rows.as_json() for rows in self.rows],
            "notes": self.notes,
        }


def compare(left: str, right: str, store: Store) -> Compared:
    """Raises RequestError where there is no such run or trial, or what it made was removed."""
    one, other = side(left, store), side(right, store)
    rows, notes = compare_rows(one, other)
    return Compared(one, other, compare_metrics(one, other), compare_fields(one, other), rows, notes)


def render(told: Compared) -> RenderableType:
    parts: list[RenderableType] = []
    for name, side_ in zip(told.names, (told.left, told.right), strict=True):
        line = Text(name, style="bold")
        parts.append(line.append(f"  {side_.made}" if side_.made else "", style="not bold dim"))
    parts += _titled("Measured", _metrics(told))
    parts += _titled("Fields that differ", _fields(told))
    parts += _titled("Rows trained on", _rows(told))
    parts += [Text(f"  {note}", style="dim") for note in told.notes]
    return Group(*parts)


def _titled(title: str, parts: Sequence[RenderableType]) -> list[RenderableType]:
    return [Text(""), Text(title, style="bold"), *parts]


def _table(columns: Sequence[str], numbers: int) -> Table:
    """Columns of texts, and from `numbers` on of numbers."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    for index, name in enumerate(columns):
        right = index >= numbers
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table


def _metrics(told: Compared) -> list[RenderableType]:
    if not told.metrics:
        return [Text("  nothing was measured yet", style="dim")]
    table = _table(("metric", *told.names, "difference"), 1)
    for metric in told.metrics:
        table.add_row(metric.name, _measured(metric.left), _measured(metric.right), _signed(metric.difference))
    return [table]


def _measured(found: Measured | None) -> str:
    return "–" if found is None else with_half(found.value, found.half)


def _signed(difference: float | None) -> str:
    if not difference:
        return "" if difference is None else "0"
    return f"{difference:+.2g}" if abs(difference) < 0.01 else f"{difference:+,.3f}"


def _fields(told: Compared) -> list[RenderableType]:
    fields, parts = told.fields, list[RenderableType]()
    if fields.differ:
        table = _table(("field", *told.names), 3)
        for field in fields.differ:
            table.add_row(field.path, _said(field.left), _said(field.right))
        parts.append(table)
    for name, stages in zip(told.names, (fields.only_left, fields.only_right), strict=True):
        if stages:
            parts.append(Text(f"  stages that only {name} has: {', '.join(stages)}"))
    return parts or [Text("  none", style="dim")]


def _said(value: Any) -> str:
    """As an experiment's file has it, about."""
    if value is None:
        return "–"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace('"', "")
    text = text.removesuffix(".0") if isinstance(value, float) else text
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _rows(told: Compared) -> list[RenderableType]:
    if not told.rows:
        return [Text("  both have no training of the same name", style="dim")] if not told.notes else []
    one, other = told.names
    table = _table(("training", "both", f"only {one}", f"only {other}"), 1)
    for rows in told.rows:
        table.add_row(rows.stage, count(rows.both), count(rows.left.only), count(rows.right.only))
    parts: list[RenderableType] = [table]
    for rows in told.rows:
        for name, given in ((one, rows.left), (other, rows.right)):
            parts += _only(rows.stage, name, given)
    return parts


def _only(stage: str, name: str, given: RowSetStats) -> list[RenderableType]:
    """What the rows are like that only one side has."""
    if not given.only:
        return []
    rows = "row" if given.only == 1 else "rows"
    parts: list[RenderableType] = [Text(f"  {stage}: {count(given.only)} {rows} only in {name}")]
    for score, median in given.scores.items():
        shared = "" if median.both is None else f", of the rows that both have {measure(median.both)}"
        parts.append(Text(f"    median {score} {measure(median.only)}{shared}"))
    for sample in given.samples:
        line = Text(f"{sample.source}:{sample.line}  ", style="dim").append(sample.text, style="not dim")
        parts.append(Padding(line, (0, 0, 0, 4), expand=False))
    return parts
