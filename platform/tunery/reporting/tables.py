"""The tables and figures that a report is made of, apart from what they show; the template escapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tunery.events.formatting import cells, is_numeric, plain
from tunery.events.stage_summary import listed

DRAWN = frozenset({"histogram", "pairs", "samples", "quarantine", "responses"})
"""Facts that have a place of their own in the report, and that nobody wants to read as numbers."""


DENSE = 9
"""Columns that fit the page in ordinary print."""


@dataclass(frozen=True)
class Cell:
    text: str
    best: bool = False


@dataclass(frozen=True)
class Table:
    """`numeric`: which columns are set flush right; `chosen`: the row that stands out, if any."""

    columns: list[str]
    numeric: list[bool]
    rows: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    chosen: int | None = None

    @property
    def dense(self) -> bool:
        """So many columns that they need small print."""
        return len(self.columns) > DENSE


@dataclass(frozen=True)
class Figure:
    """A chart, its title, what the reader must know about it, and its legend (CSS class, words)."""

    title: str
    svg: str
    note: str = ""
    keys: list[tuple[str, str]] = field(default_factory=list)
    small: bool = False
    wide: bool = False
    """Takes the whole width of the page."""


@dataclass(frozen=True)
class Node:
    """A fact: plain text, named facts below it, or a table."""

    text: str = ""
    pairs: list[tuple[str, Node]] = field(default_factory=list)
    table: Table | None = None


def table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    notes: Sequence[str] = (),
    best: Mapping[int, str] | None = None,
    chosen: int | None = None,
) -> Table:
    """A table of raw values. `best` marks, in the columns it names, the 'lowest' or the 'highest' number."""
    padded = [[*row, *[None] * (len(columns) - len(row))][: len(columns)] for row in rows]
    by_column = [[row[index] for row in padded] for index in range(len(columns))]
    texts = [
        ["" if value is None else said for value, said in zip(column, cells(column), strict=True)]
        for column in by_column
    ]
    winners = {index: _winner(by_column[index], how) for index, how in (best or {}).items()}
    body = [
        [Cell(texts[column][row], best=winners.get(column) == row) for column in range(len(columns))]
        for row in range(len(padded))
    ]
    numeric = [is_numeric(column) or _looks_numeric(said) for column, said in zip(by_column, texts, strict=True)]
    return Table(list(columns), numeric, body, list(notes), chosen)


def fact(value: object, key: str = "") -> Node:
    """Any fact as a tree that the page can show, whatever kind of stage it comes from."""
    if isinstance(value, Mapping):
        inner = {str(name): item for name, item in value.items() if name not in DRAWN}
        if inner and all(
            isinstance(item, Mapping) and "rule" in item for item in inner.values()
        ):  # resolved `auto` values
            return Node(
                table=table(
                    ["field", "value", "why"],
                    [[name, plain(item.get("value")), item["rule"]] for name, item in inner.items()],
                )
            )
        return (
            Node(pairs=[(_label(name, item), fact(item, name)) for name, item in inner.items()]) if inner else Node("–")
        )
    rows: list[Mapping[str, Any]] = listed(value)
    if rows and isinstance(value, list | tuple) and len(rows) == len(value):
        columns = list(dict.fromkeys(str(name) for row in rows for name in row))
        return Node(
            table=table(
                [_words(name) for name in columns],
                [[_flat(row.get(name)) for name in columns] for row in rows],
            )
        )
    return Node(plain(value, key) if value not in ("", [], ()) else "–")


def _flat(value: object) -> object:
    return value if isinstance(value, int | float | str) or value is None else plain(value)


def _words(name: str) -> str:
    return name.replace("_", " ") or "good"  # the dataset's planted rows: the kind "" is of those left as they were


def _label(name: str, value: object) -> str:
    """A fact's name; without its unit where the value is said with one ('peak memory' 4.0 GiB)."""
    said = isinstance(value, int | float) and not isinstance(value, bool)
    return _words(name.removesuffix("_bytes").removesuffix("_seconds") if said else name)


def _winner(column: Sequence[object], how: str) -> int | None:
    numbers = [(float(value), index) for index, value in enumerate(column) if isinstance(value, int | float)]
    if len(numbers) < 2:
        return None
    return (min if how == "lowest" else max)(numbers)[1]


def _looks_numeric(texts: Sequence[str]) -> bool:
    """Numbers that were written out with a sign, a unit or an interval, such as '+0.12', are flush right as well."""
    present = [said for said in texts if said]
    return bool(present) and all(
        said.replace(" ± ", "").lstrip("+-−–").replace(",", "").replace(".", "").rstrip("%s").isdigit()
        for said in present
    )
