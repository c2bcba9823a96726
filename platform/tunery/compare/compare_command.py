"""`tunery compare`: differences of two runs or trials in metrics, config fields and training rows, as text or JSON."""

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

from tunery.compare.fields import FieldDifferences, compare_fields
from tunery.compare.row_sets import RowComparison, RowSetStats, compare_rows
from tunery.compare.side_metrics import Metric, MetricValue, compare_metrics
from tunery.compare.sides import RunSelection, select_run
from tunery.events.formatting import count, measure, with_ci
from tunery.store import Store

MAX_VALUE_LENGTH = 120
"""Characters of a field's value that are printed."""


@dataclass(frozen=True)
class Comparison:
    left: RunSelection
    right: RunSelection
    metrics: list[Metric]
    fields: FieldDifferences
    rows: list[RowComparison]
    notes: list[str]

    @property
    def names(self) -> tuple[str, str]:
        """Column names; without the run's name if both sides are of the same run."""
        sides = (self.left, self.right)
        if self.left.record.folder != self.right.record.folder:
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


def compare(left: str, right: str, store: Store) -> Comparison:
    """Compare two runs or trials by name. Raises RequestError if one does not exist or its artifacts were removed."""
    one, other = select_run(left, store), select_run(right, store)
    rows, notes = compare_rows(one, other)
    return Comparison(one, other, compare_metrics(one, other), compare_fields(one, other), rows, notes)


def render(comparison: Comparison) -> RenderableType:
    parts: list[RenderableType] = []
    for name, side in zip(comparison.names, (comparison.left, comparison.right), strict=True):
        line = Text(name, style="bold")
        parts.append(line.append(f"  {side.description}" if side.description else "", style="not bold dim"))
    parts += _titled("Metrics", _metrics(comparison))
    parts += _titled("Fields that differ", _fields(comparison))
    parts += _titled("Training rows", _rows(comparison))
    parts += [Text(f"  {note}", style="dim") for note in comparison.notes]
    return Group(*parts)


def _titled(title: str, parts: Sequence[RenderableType]) -> list[RenderableType]:
    return [Text(""), Text(title, style="bold"), *parts]


def _table(columns: Sequence[str], num_text_columns: int) -> Table:
    """A table whose first `num_text_columns` columns are left-aligned texts; the others are right-aligned numbers."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, padding=(0, 1))
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index >= num_text_columns else "left", overflow="fold")
    return table


def _metrics(comparison: Comparison) -> list[RenderableType]:
    if not comparison.metrics:
        return [Text("  no metrics yet", style="dim")]
    table = _table(("metric", *comparison.names, "difference"), 1)
    for metric in comparison.metrics:
        table.add_row(metric.name, _value(metric.left), _value(metric.right), _signed(metric.difference))
    return [table]


def _value(metric: MetricValue | None) -> str:
    return "–" if metric is None else with_ci(metric.value, metric.ci_half_width)


def _signed(difference: float | None) -> str:
    if not difference:
        return "" if difference is None else "0"
    return f"{difference:+.2g}" if abs(difference) < 0.01 else f"{difference:+,.3f}"


def _fields(comparison: Comparison) -> list[RenderableType]:
    fields, parts = comparison.fields, list[RenderableType]()
    if fields.differ:
        table = _table(("field", *comparison.names), 3)
        for field in fields.differ:
            table.add_row(field.path, _format_value(field.left), _format_value(field.right))
        parts.append(table)
    for name, stages in zip(comparison.names, (fields.only_left, fields.only_right), strict=True):
        if stages:
            parts.append(Text(f"  stages only in {name}: {', '.join(stages)}"))
    return parts or [Text("  none", style="dim")]


def _format_value(value: Any) -> str:
    """The value approximately as an experiment file has it."""
    if value is None:
        return "–"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False).replace('"', "")
    text = text.removesuffix(".0") if isinstance(value, float) else text
    return text if len(text) <= MAX_VALUE_LENGTH else text[: MAX_VALUE_LENGTH - 1] + "…"


def _rows(comparison: Comparison) -> list[RenderableType]:
    if not comparison.rows:
        return [Text("  no training of the same name in both", style="dim")] if not comparison.notes else []
    one, other = comparison.names
    table = _table(("training", "both", f"only {one}", f"only {other}"), 1)
    for rows in comparison.rows:
        table.add_row(rows.stage, count(rows.both), count(rows.left.only), count(rows.right.only))
    parts: list[RenderableType] = [table]
    for rows in comparison.rows:
        for name, stats in ((one, rows.left), (other, rows.right)):
            parts += _exclusive_rows(rows.stage, name, stats)
    return parts


def _exclusive_rows(stage: str, name: str, stats: RowSetStats) -> list[RenderableType]:
    """Median scores and samples of the rows that only one side has."""
    if not stats.only:
        return []
    rows = "row" if stats.only == 1 else "rows"
    parts: list[RenderableType] = [Text(f"  {stage}: {count(stats.only)} {rows} only in {name}")]
    for score, median in stats.scores.items():
        shared = "" if median.both is None else f" (rows in both: {measure(median.both)})"
        parts.append(Text(f"    median {score} {measure(median.only)}{shared}"))
    for sample in stats.samples:
        line = Text(f"{sample.source}:{sample.line}  ", style="dim").append(sample.text, style="not dim")
        parts.append(Padding(line, (0, 0, 0, 4), expand=False))
    return parts
