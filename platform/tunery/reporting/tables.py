"""Tables and figures of the report and of the terminal. They hold unescaped text: the HTML template escapes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunery.events.formatting import cells, is_numeric, plain
from tunery.events.stage_summary import mappings_in
from tunery.spec.stage_kinds import Direction

SummaryTable = dict[str, Any]
"""A table that a run logs at its end, in the event `comparison`: title, columns, rows, notes."""
OWN_SECTION = frozenset({"histogram", "pairs", "samples", "quarantine", "responses"})
"""Facts that have their own section in the report, and are omitted from the list of a stage's facts."""


MAX_NORMAL_COLUMNS = 9
"""A table with more columns is set in a smaller font."""


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """`numeric`: which columns are right-aligned; `highlighted`: index of the highlighted row, if any; `optional`:
    columns that a narrow table may omit, last one first."""

    columns: list[str]
    numeric: list[bool]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    highlighted: int | None = None
    optional: list[str] = field(default_factory=list)

    @property
    def dense(self) -> bool:
        return len(self.columns) > MAX_NORMAL_COLUMNS

    def texts(self, column: int) -> list[str]:
        """The texts of a column."""
        return [row[column].text for row in self.rows]

    def without(self, column: str) -> Table:
        """The table without a column, with the same notes."""
        at = self.columns.index(column)
        return dataclasses.replace(
            self,
            columns=[*self.columns[:at], *self.columns[at + 1 :]],
            numeric=[*self.numeric[:at], *self.numeric[at + 1 :]],
            rows=[[*row[:at], *row[at + 1 :]] for row in self.rows],
            optional=[name for name in self.optional if name != column],
        )


@dataclass(frozen=True)
class Figure:
    """A chart with its title, a note, and its legend as (CSS class, label)."""

    title: str
    svg: str
    note: str = ""
    keys: list[tuple[str, str]] = field(default_factory=list)
    small: bool = False
    wide: bool = False
    """Spans the full width of the page."""


@dataclass(frozen=True)
class Node:
    """A fact as a tree: plain text, nested facts by name, or a table."""

    text: str = ""
    pairs: list[tuple[str, Node]] = field(default_factory=list)
    table: Table | None = None


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    notes: Sequence[str] = (),
    best: Mapping[int, Direction] | None = None,
    highlighted: int | None = None,
    optional: Sequence[str] = (),
) -> Table:
    """A table of raw values. `best` maps the indices of columns whose best number is marked to its direction."""
    padded = [[*row, *[None] * (len(columns) - len(row))][: len(columns)] for row in rows]
    by_column = [[row[index] for row in padded] for index in range(len(columns))]
    texts = [
        ["" if value is None else text for value, text in zip(column, cells(column), strict=True)]
        for column in by_column
    ]
    best_rows = {index: _best_row(by_column[index], direction) for index, direction in (best or {}).items()}
    body = [
        [Cell(texts[column][row], best=best_rows.get(column) == row) for column in range(len(columns))]
        for row in range(len(padded))
    ]
    numeric = [is_numeric(values) or _looks_numeric(column) for values, column in zip(by_column, texts, strict=True)]
    return Table(list(columns), numeric, body, list(notes), highlighted, [name for name in optional if name in columns])


def fact(value: object, key: str = "") -> Node:
    """Convert a fact of any stage kind to a tree that the page can show."""
    if isinstance(value, Mapping):
        inner = {str(name): item for name, item in value.items() if name not in OWN_SECTION}
        if inner and all(
            isinstance(item, Mapping) and "rule" in item for item in inner.values()
        ):  # resolved `auto` values
            return Node(
                table=table(
                    ["field", "value", "rule"],
                    [[name, plain(item.get("value")), item["rule"]] for name, item in inner.items()],
                )
            )
        return (
            Node(pairs=[(_label(name, item), fact(item, name)) for name, item in inner.items()]) if inner else Node("–")
        )
    rows: list[Mapping[str, Any]] = mappings_in(value)
    if rows and isinstance(value, list | tuple) and len(rows) == len(value):
        columns = list(dict.fromkeys(str(name) for row in rows for name in row))
        return Node(
            table=table(
                [_title(name) for name in columns],
                [[_flat(row.get(name)) for name in columns] for row in rows],
            )
        )
    return Node(plain(value, key) if value not in ("", [], ()) else "–")


def _flat(value: object) -> object:
    return value if isinstance(value, int | float | str) or value is None else plain(value)


def _title(name: str) -> str:
    return name.replace("_", " ") or "good"  # in the counts of injected corruption, intact rows have the kind ""


def _label(name: str, value: object) -> str:
    """Name of a fact, without its unit if the value is formatted with one ('peak memory' 4.0 GiB)."""
    has_unit = isinstance(value, int | float) and not isinstance(value, bool)
    return _title(name.removesuffix("_bytes").removesuffix("_seconds") if has_unit else name)


def _best_row(column: Sequence[object], direction: Direction) -> int | None:
    numbers = [(float(value), index) for index, value in enumerate(column) if isinstance(value, int | float)]
    if len(numbers) < 2:
        return None
    return (min if direction == "minimize" else max)(numbers)[1]


def _looks_numeric(texts: Sequence[str]) -> bool:
    """Whether all texts begin with a number, perhaps with a sign, such as '+0.12', '3 of 5' and '2 min', or are '–'."""
    return any(texts) and all(text[:1] in "+-−0123456789–" for text in texts)
