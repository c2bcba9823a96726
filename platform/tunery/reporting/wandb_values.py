"""Converts values of the event log to types that W&B can display: flat names, numbers, tables, histograms."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tunery.reporting.responses import RESPONSES, responses_table

NAME_KEYS = ("model", "set", "score", "name", "trial")
"""Keys that name a row of a list: the results of an evaluation become `<model>.<set>.loss`, like a search's metric."""
MAX_LIST_LENGTH = 100
REPORT_ONLY = frozenset({"samples", "quarantine", "pairs"})
"""Facts that only the local report shows: texts of rows, and counts for a chart.

wandb_search.py logs some rows that the filters of a search's best and worst trial kept and dropped. Model responses
(`responses`) are logged as a table, with their prompts."""


@dataclass(frozen=True)
class WandbTable:
    columns: list[str]
    rows: list[list[Any]]


@dataclass(frozen=True)
class Histogram:
    edges: list[float]
    """One more than `counts`."""
    counts: list[float]


HistoryValue = float | WandbTable | Histogram
"""A value in a row of a W&B run's history."""


def flatten(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten `facts` to names joined by dots. Omits None, REPORT_ONLY facts, histograms (see `histograms`) and
    responses (see `responses`).

    Rows of a list are named by NAME_KEYS; rows of `results` without the prefix `results.`. Non-finite numbers become
    W&B's strings for them ("NaN", "Infinity"), because wandb 0.31 drops such floats from a summary. A list with more
    than MAX_LIST_LENGTH values is replaced by its length, as `<name>.count`.
    """
    flat: dict[str, Any] = {}
    for name, value in facts.items():
        path = f"{prefix}{name or 'none'}"  # in counts of injected corruption, intact rows have the kind ""
        if value is None or _is_histogram(value) or name in REPORT_ONLY or name == RESPONSES:
            continue
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{path}.")
        elif isinstance(value, list | tuple) and value and all(isinstance(item, Mapping) for item in value):
            flat |= flatten(_by_name(value), f"{path}." if name != "results" else prefix)
        elif isinstance(value, list | tuple) and len(value) > MAX_LIST_LENGTH:
            flat[f"{path}.count"] = len(value)
        else:
            flat[path] = _plain(value)
    return flat


def histograms(facts: Mapping[str, Any], prefix: str = "") -> dict[str, HistoryValue]:
    """All histograms in `facts`, by dotted name; corrupted rows, if any, have a separate histogram."""
    result: dict[str, HistoryValue] = {}
    for name, value in facts.items():
        if _is_histogram(value):
            edges, counts, corrupted = ([*value.get(key, ())] for key in ("edges", "counts", "corrupted"))
            if counts and len(edges) == len(counts) + 1:
                result[f"{prefix}{name}"] = Histogram(edges, counts)
                if any(corrupted) and len(corrupted) == len(counts):
                    result[f"{prefix}{name}_corrupted"] = Histogram(edges, corrupted)
        elif isinstance(value, Mapping):
            result |= histograms(value, f"{prefix}{name}.")
    return result


def responses(facts: Mapping[str, Any]) -> dict[str, HistoryValue]:
    """A table of a stage's model responses, before and after training or of several models."""
    columns, rows = responses_table(facts)
    return {RESPONSES: table(columns, rows)} if rows else {}


def numbers(values: Mapping[str, Any]) -> dict[str, HistoryValue]:
    """The numbers among `values`, including non-finite ones, so that a curve that ends in NaN shows it."""
    return {
        str(name): int(value) if isinstance(value, bool) else value
        for name, value in values.items()
        if isinstance(value, int | float)
    }


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> WandbTable:
    """A table whose rows are padded or truncated to `columns`, with cells converted to types that W&B can display."""
    width = len(columns)
    return WandbTable(
        list(columns), [[None if cell is None else _plain(cell) for cell in _padded(row, width)] for row in rows]
    )


def _padded(row: Sequence[Any], width: int) -> list[Any]:
    return [*row, *[None] * (width - len(row))][:width]


def _is_histogram(value: object) -> bool:
    return isinstance(value, Mapping) and "edges" in value and "counts" in value


def _by_name(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rows of a list by their names, or by their indices if they have no name or share one."""
    named: dict[str, Any] = {}
    for index, row in enumerate(rows):
        name = ".".join(str(row[key]) for key in NAME_KEYS if key in row) or str(index)
        rest = {key: value for key, value in row.items() if key not in NAME_KEYS}
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
