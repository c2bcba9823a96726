"""The values of the event log in forms that W&B can draw: flat names, plain numbers, tables, histograms. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunery.reporting.responses import RESPONSES, responses_table

NAMING = ("model", "set", "score", "name", "trial")
"""The entries that name a row of a list: the results of an evaluation become `<model>.<set>.loss`, which is how a
search names its metric."""
LONGEST_LIST = 100
REPORT_ONLY = frozenset({"samples", "quarantine", "pairs"})
"""Facts that are for the local report alone: texts of rows, and counts for a chart.

A few rows that the filters of a search's best and worst trial kept and dropped are a table (wandb_search.py): what a
filter keeps says more than its share. The answers that models gave (`responses`) are wanted in W&B, prompts and all: as
a table, not among the numbers."""


@dataclass(frozen=True)
class Table:
    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Histogram:
    edges: list[float]
    """One more than counts."""
    counts: list[float]


Drawn = float | Table | Histogram
"""What a line of a run's history may hold."""


def flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`facts` with names joined by dots; what is None or REPORT_ONLY is left out, histograms are
    `histograms`' part, and answers `answers`'.

    Rows of a list go by their names (NAMING), and those of `results` without that word before them.
    Numbers that are not finite become W&B's own words for them ("NaN", "Infinity"): as floats wandb 0.31 leaves them
    out of a summary. Of a list of more than LONGEST_LIST values only their number is kept, as `<name>.count`.
    """
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        path = f"{prefix}{name or 'none'}"  # rows by kind of damage, where intact rows have the kind ""
        if value is None or _is_histogram(value) or name in REPORT_ONLY or name == RESPONSES:
            continue
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            flat |= flatten(_by_name(value), f"{path}." if name != "results" else prefix)
        elif isinstance(value, list | tuple) and len(value) > LONGEST_LIST:
            flat[f"{path}.count"] = len(value)
        else:
            flat[path] = _plain(value)
    return flat


def histograms(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Drawn]:
    """The histograms anywhere in `facts`, by dotted name; planted rows, where there are any, as one of their own."""
    found: dict[str, Drawn] = {}
    for name, value in facts.items():
        if _is_histogram(value):
            edges, counts, planted = ([*value.get(key, ())] for key in ("edges", "counts", "planted"))
            if counts and len(edges) == len(counts) + 1:
                found[f"{prefix}{name}"] = Histogram(edges, counts)
                if any(planted) and len(planted) == len(counts):
                    found[f"{prefix}{name}_planted"] = Histogram(edges, planted)
        elif isinstance(value, Mapping):
            found |= histograms(value, f"{prefix}{name}.")
    return found


def answers(facts: Mapping[str, Any]) -> dict[str, Drawn]:
    """The answers that a stage tells, before and after its training or of several models, as one table."""
    columns, rows = responses_table(facts)
    return {RESPONSES: table(columns, rows)} if rows else {}


def numbers(values: Mapping[str, Any]) -> dict[str, Drawn]:
    """The numbers among `values`, also those that are not finite: a curve that ends in NaN has to show it."""
    return {
        str(name): int(value) if isinstance(value, bool) else value
        for name, value in values.items()
        if isinstance(value, int | float)
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> Table:
    """Every row as long as `columns`, every cell something that W&B can show."""
    width = len(columns)
    return Table(
        list(columns), [[None if cell is None else _plain(cell) for cell in _filled(row, width)] for row in rows]
    )


def _filled(row: Sequence[Any], width: int) -> list[Any]:
    return [*row, *[None] * (width - len(row))][:width]


def _is_histogram(value: object) -> bool:
    return isinstance(value, Mapping) and "edges" in value and "counts" in value


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of a list under their names, or under their places where they have none or share one."""
    named: dict[str, Any] = {}
    for index, row in enumerate(rows):
        name = ".".join(str(row[key]) for key in NAMING if key in row) or str(index)
        rest = {key: value for key, value in row.items() if key not in NAMING}
        named[f"{name}.{index}" if name in named else name] = rest
    return named


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(item, bool | int | float | str) for item in value):
        return [_plain(item) for item in value]
    return json.dumps(value, default=str)
