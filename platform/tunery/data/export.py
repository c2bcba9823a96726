"""Rows out of tunery again: what a filter kept, or dropped, as .jsonl, .csv, .xlsx or .parquet.

A row leaves in the shape that it came in, so that tunery and others read it back:

    text        text
    question    prompt, completion; where any conversation has more turns, or a turn more than its text: messages
    preference  prompt (or messages), chosen, rejected
    rated       prompt, completion (or messages), label
    prompt      prompt (or messages)

with system and tools where there are some, then id, source, line and every column of the score table; of dropped rows
the rule too. Which columns there are is found by a first pass, rows are written by a second: one shard is in memory at
a time. A file is written aside and renamed, so it is there whole or not at all.
"""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from tunery.errors import RequestError, StageError, TuneryError
from tunery.store.rows import OPTIONAL_TURN_FIELDS, TURNS, Row, Turn, shape_of, shards
from tunery.store.vectors import is_vectors

ENDINGS = (".jsonl", ".csv", ".xlsx", ".parquet")
SHEET_ROWS = 1_048_575
"""Rows of an Excel sheet (1,048,576), less the header."""
CELL = 32_767
"""Characters of an Excel cell."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that a spreadsheet takes for a formula
(https://owasp.org/www-community/attacks/CSV_Injection)."""
UNWRITABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")
"""What XML 1.0 has no way to write."""

_BATCH = 1024
_TYPES: Mapping[str, Any] = {"label": pa.bool_(), "line": pa.int64()}


@dataclass
class Written:
    """What became of an export."""

    rows: int = 0
    guarded: int = 0
    """Texts that have an apostrophe in front of them now, so that no spreadsheet takes them for a formula."""
    replaced: int = 0
    """Texts in which characters were replaced that a workbook can't hold."""


def check_ending(path: Path, option: str) -> None:
    """Raises RequestError for a file of a form that is not written."""
    if path.suffix not in ENDINGS:
        raise RequestError(
            f"`{option} {path}` is of no form that is written",
            cause=f"it ends in `{path.suffix}`" if path.suffix else "it has no ending",
            remedy=f"let it end in one of: {' '.join(ENDINGS)}",
        )


def export_kept(selection: Path, filtered: Path, out: Path) -> Written:
    """The rows that a select artifact kept, with the scores of `filtered`, the artifact that it was made from."""
    return _export(_Verdicts(selection, filtered, kept=True), out)


def export_dropped(selection: Path, filtered: Path, out: Path) -> Written:
    """The rows that it dropped, with the rule."""
    return _export(_Verdicts(selection, filtered, kept=False), out)


class _Verdicts:
    """Rows of `filtered` that the selection kept, or dropped; as (row, scores, rule), read anew at each iteration."""

    def __init__(self, selection: Path, filtered: Path, *, kept: bool) -> None:
        self._selection, self._filtered, self.kept = selection, filtered, kept
        scores = filtered / "scores"
        first = scores / shards(filtered)[0].name
        self._scores = scores if first.is_file() else None
        schema = pq.read_schema(first) if self._scores else pa.schema([])
        # Vectors are no cell of a table: who wants them finds them in the score artifact.
        self.columns = {field.name: field.type for field in schema if field.name != "id" and not is_vectors(field.type)}

    def __iter__(self) -> Iterator[tuple[Row, Row, str]]:
        with (self._selection / "dropped.jsonl").open(encoding="utf-8") as file:
            # In the order of the rows; a file is read once, so its name and line make each of them another.
            dropped = (json.loads(line) for line in file)
            next_dropped = next(dropped, None)
            for path in shards(self._filtered):
                rows = pq.read_table(path)
                scores = pq.read_table(self._scores / path.name, columns=list(self.columns)) if self._scores else None
                for start in range(0, len(rows), _BATCH):
                    told = scores.slice(start, _BATCH).to_pylist() if scores is not None else None
                    for index, row in enumerate(rows.slice(start, _BATCH).to_pylist()):
                        is_dropped = next_dropped is not None and all(
                            row[key] == next_dropped[key] for key in ("id", "source", "line")
                        )
                        if is_dropped != self.kept:
                            rule = str(next_dropped["rule"]) if is_dropped and next_dropped else ""
                            yield row, told[index] if told else {}, rule
                        if is_dropped:
                            next_dropped = next(dropped, None)
            if next_dropped is not None:
                raise StageError(
                    self._selection.name,
                    f"{self._selection / 'dropped.jsonl'} names a row that {self._filtered} has not",
                    cause="one of the two was changed by hand",
                    remedy="move both away and give the command again",
                )


@dataclass(frozen=True)
class Layout:
    """Which columns the rows need."""

    content: tuple[str, ...]
    rows: int
    simple: bool
    """Questions and answers are texts, not turns."""
    sides_as_turns: bool
    """Some chosen or rejected answer is more than its text: then those are turns."""
    turn_fields: tuple[str, ...]
    """The optional fields that some turn has, in the order of the schema."""

    def fields(self, row: Row) -> Row:
        """A row's content, as the columns have it; turns are lists."""
        shape = shape_of(row)
        if shape == "text":
            return {"text": row["text"]}
        turns: list[Turn] = list(row["messages"])
        found: Row = {"tools": row["tools"], "label": row["label"]}
        judged: list[Turn] = []
        if shape == "preference":
            chosen = turns.pop()
            sides = {"chosen": [chosen], "rejected": row["rejected"]}
            found |= sides if self.sides_as_turns else {name: side[-1]["content"] for name, side in sides.items()}
        elif self.simple and turns[-1]["role"] == "assistant":
            judged = [turns.pop()]
        if not self.simple:
            return {**found, "messages": turns}
        if turns[0]["role"] == "system":
            found["system"] = turns.pop(0)["content"]
        return {**found, "prompt": turns[0]["content"], **({"completion": judged[0]["content"]} if judged else {})}


def layout_of(rows: Iterator[Row]) -> Layout:
    """By looking at all of them."""
    simple, sides_as_turns, count = True, False, 0
    found: set[str] = set()
    turn_fields: set[str] = set()
    for row in rows:
        count += 1
        turns = row["messages"]
        found.add("turns" if turns else "text")
        if not turns:
            continue
        simple = simple and _is_simple(row)
        turn_fields.update(*(_optional_fields(turn) for turn in [*turns, *(row["rejected"] or ())]))
        found |= {name for name in ("tools", "label") if row[name] is not None}
        sides_as_turns = sides_as_turns or (
            bool(row["rejected"]) and any(_optional_fields(turn) for turn in (turns[-1], *row["rejected"]))
        )
        found |= {"system"} if turns[0]["role"] == "system" else set()
        found |= {"rejected"} if row["rejected"] else {"answer"} if turns[-1]["role"] == "assistant" else set()
    names = ["text"] if "text" in found else []
    if "turns" in found:
        names += ["system"] if simple and "system" in found else []
        names += ["prompt"] if simple else ["messages"]
        names += ["completion"] if simple and "answer" in found else []
        names += ["chosen", "rejected"] if "rejected" in found else []
        names += [name for name in ("label", "tools") if name in found]
    fields = tuple(name for name in OPTIONAL_TURN_FIELDS if name in turn_fields)
    return Layout(tuple(names), count, simple, sides_as_turns, fields)


def _optional_fields(turn: Turn) -> list[str]:
    return [name for name in OPTIONAL_TURN_FIELDS if turn.get(name) not in (None, "")]


def _is_simple(row: Row) -> bool:
    """A question, perhaps with a system's turn before it, and at most one answer; no turn is more than its text."""
    turns: list[Turn] = row["messages"]
    if any(_optional_fields(turn) for turn in [*turns, *(row["rejected"] or ())]):
        return False
    roles = [turn["role"] for turn in turns]
    return roles[roles[0] == "system" :] in (["user"], ["user", "assistant"])


class Writer(Protocol):
    def write(self, row: Row) -> None: ...


def _export(verdicts: _Verdicts, out: Path) -> Written:
    layout = layout_of(row for row, _, _ in verdicts)
    if out.suffix == ".xlsx":
        _check_rows(layout, out)
    columns = [*layout.content, "id", "source", "line", *verdicts.columns, *([] if verdicts.kept else ["rule"])]
    types = {name: verdicts.columns.get(name, _type(name, layout)) for name in columns}
    done = Written()
    aside = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with _WRITERS[out.suffix](aside, types, done) as writer:
            for row, scores, rule in verdicts:
                told = {"id": row["id"], "source": row["source"], "line": row["line"], **scores, "rule": rule}
                writer.write({**layout.fields(row), **told})
                done.rows += 1
        aside.replace(out)
    except OSError as error:
        raise TuneryError(
            f"{out} can't be written",
            cause=error.strerror or str(error),
            remedy="make room, or give another place: nothing is scored again",
        ) from error
    finally:
        with suppress(OSError):
            aside.unlink()
    return done


def _type(name: str, layout: Layout) -> Any:
    if name == "messages" or (name in ("chosen", "rejected") and layout.sides_as_turns):
        # Without the fields that are null everywhere: chat templates ask whether a key is there.
        fields = (field for field in TURNS.value_type if field.name in ("role", "content", *layout.turn_fields))
        return pa.list_(pa.struct(list(fields)))
    return _TYPES.get(name, pa.string())


def _check_rows(layout: Layout, out: Path) -> None:
    if layout.rows > SHEET_ROWS:
        raise RequestError(
            f"{layout.rows:,} rows don't fit into {out}",
            cause=f"an Excel sheet has {SHEET_ROWS:,} below its header",
            remedy=f"give another ending, as {out.stem}.parquet (nothing is scored again), or keep fewer rows",
        )


# Writers: of rows as Layout.fields has them, with id, source, line and scores.


def _messages(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """In OpenAI's form: calls of tools as lists, and no key for what a turn has not."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        message = {name: value for name, value in turn.items() if value not in (None, "") or name == "content"}
        if calls := turn.get("tool_calls"):
            message["tool_calls"] = json.loads(calls)
        messages.append(message)
    return messages


def _finite(value: Any) -> Any:
    """JSON and spreadsheets have no NaN: a row without a score has an empty cell."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_text(value: Any) -> Any:
    return json.dumps(_messages(value), ensure_ascii=False) if isinstance(value, list) else _finite(value)


@contextmanager
def _jsonl(path: Path, types: Mapping[str, Any], done: Written) -> Iterator[Writer]:
    class Lines:
        def write(self, row: Row) -> None:
            told = {name: row.get(name) for name in types}
            told = {
                name: _messages(value) if isinstance(value, list) else _finite(value)
                for name, value in told.items()
                if value is not None or name in ("source", "line")
            }
            if "tools" in told:
                told["tools"] = json.loads(str(told["tools"]))
            file.write(json.dumps(told, ensure_ascii=False) + "\n")

    with path.open("w", encoding="utf-8") as file:
        yield Lines()


@contextmanager
def _csv(path: Path, types: Mapping[str, Any], done: Written) -> Iterator[Writer]:
    class Cells:
        def write(self, row: Row) -> None:
            writer.writerow([self._cell(_as_text(row.get(name))) for name in types])

        def _cell(self, value: Any) -> Any:
            # A CSV has no types: what begins like a formula is one, unless something stands before it.
            if isinstance(value, str) and value.startswith(FORMULA):
                done.guarded += 1
                return f"'{value}"
            return ("true" if value else "false") if isinstance(value, bool) else value

    # The mark in front tells Excel that it is UTF-8; readers of CSV, ours too, skip it.
    with path.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(types)
        yield Cells()


@contextmanager
def _xlsx(path: Path, types: Mapping[str, Any], done: Written) -> Iterator[Writer]:
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.styles import Font

    book = Workbook(write_only=True)
    sheet = book.create_sheet("rows")
    sheet.freeze_panes = "A2"

    class Cells:
        def write(self, row: Row) -> None:
            sheet.append([self.cell(_as_text(row.get(name))) for name in types])

        def cell(self, value: Any) -> Any:
            if not isinstance(value, str):
                return value
            text = UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", value)
            if len(text) > CELL:
                raise RequestError(
                    f"a text of {len(text):,} characters doesn't fit into a workbook",
                    cause=f"an Excel cell holds {CELL:,}, and none is cut in silence",
                    remedy="give another ending, as .parquet (nothing is scored again), or a rule on `length`",
                )
            done.replaced += text != value
            cell = WriteOnlyCell(sheet, text)
            cell.data_type = "s"  # openpyxl takes what begins with "=" for a formula ...
            cell.number_format = "@"  # ... and a spreadsheet takes an id of digits for a number
            cell.quotePrefix = text.startswith(FORMULA)  # so it stays a text when somebody edits the cell
            return cell

    cells = Cells()
    header = [cells.cell(name) for name in types]
    for cell in header:
        cell.font = Font(bold=True)
    sheet.append(header)
    yield cells
    book.save(path)


@contextmanager
def _parquet(path: Path, types: Mapping[str, Any], done: Written) -> Iterator[Writer]:
    schema = pa.schema(list(types.items()))

    class Tables:
        def __init__(self) -> None:
            self.rows: list[Row] = []

        def write(self, row: Row) -> None:
            self.rows.append({name: row.get(name) for name in types})
            if len(self.rows) == _BATCH:
                self.flush()

        def flush(self) -> None:
            file.write_table(pa.Table.from_pylist(self.rows, schema))
            self.rows = []

    with pq.ParquetWriter(path, schema) as file:
        tables = Tables()
        yield tables
        tables.flush()


_WRITERS = {".jsonl": _jsonl, ".csv": _csv, ".xlsx": _xlsx, ".parquet": _parquet}
