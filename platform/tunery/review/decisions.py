"""Decisions of a person, by row id: read from .jsonl or .xlsx, written to .jsonl one by one.

A line of the .jsonl file is {"id", "decision": "keep" | "drop" | null, "t"}; of several lines of one id the last
counts, null takes the decision back. A line with "undo": true undid the one before it. Lines are only ever added, and
each is on the disk before the reviewer sees the next row, so neither a closed tab nor a killed process loses one.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, cast, get_args
from xml.etree.ElementTree import ParseError
from zipfile import BadZipFile

from tunery.errors import RequestError
from tunery.ingest.formats.excel import all_rows
from tunery.spec import Review

Decision = Literal["keep", "drop"]
DECISIONS: tuple[Decision, ...] = get_args(Decision)
_DECISION_OF: dict[str, Decision] = {decision: decision for decision in DECISIONS}
SHEET = "review"
"""Of a workbook: the one with the decisions."""


class BadDecisions(RequestError):
    """A file of decisions that can't be read, or a cell or line in it that says no decision."""


def decisions_path(stage: Review, folder: Path) -> Path:
    return folder / Path(stage.decisions).expanduser()


def decisions_identity(stage: Review, folder: Path) -> str | None:
    """Hash of what was decided, whoever wrote it down and when; None where nothing is."""
    decided = read_decisions(decisions_path(stage, folder))
    return hashlib.sha256(json.dumps(sorted(decided.items())).encode()).hexdigest() if decided else None


def read_decisions(path: Path) -> dict[str, Decision]:
    """By row id. A file that isn't there holds none. Raises BadDecisions."""
    try:
        if path.suffix == ".xlsx":
            return _from_workbook(path)
        with path.open("rb") as file:
            return replay(path, file.read())[0]
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise BadDecisions(
            f"{path} can't be read", cause=str(error), remedy="give the path of a readable file"
        ) from None


# .jsonl


@dataclass(frozen=True)
class DecisionEdit:
    """A decision that can be undone: what was said of `id` before it."""

    id: str
    before: Decision | None


def replay(path: Path, content: bytes) -> tuple[dict[str, Decision], list[DecisionEdit]]:
    """What a file of decisions says after its last line, and what can be undone, the newest last.

    A last line without its end is the write that a crash cut off: nobody was told that it was saved.
    """
    decided: dict[str, Decision] = {}
    steps: list[DecisionEdit] = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        id, decision, undo = _parse(path, number, line.removeprefix(b"\xef\xbb\xbf"))
        if undo:
            if steps:
                steps.pop()
        else:
            steps.append(DecisionEdit(id, decided.get(id)))
        decided.pop(id, None)
        if decision is not None:
            decided[id] = decision
    return decided, steps


def _parse(path: Path, number: int, line: bytes) -> tuple[str, Decision | None, bool]:
    try:
        said: Any = json.loads(line)
        id, decision, undo = said["id"], said["decision"], said.get("undo", False)
    except (ValueError, KeyError, TypeError, AttributeError):
        id, decision, undo = None, None, False
    if not isinstance(id, str) or not id or (decision is not None and decision not in DECISIONS):
        shown = line[:120].decode(errors="replace").strip()
        raise BadDecisions(
            f"{path}:{number}: `{shown}` is no decision",
            cause='a line is {"id": "<the row\'s id>", "decision": "keep" or "drop", or null to take it back}',
            remedy="correct the line or remove it",
        )
    return id, cast("Decision | None", decision), bool(undo)


class DecisionLog:
    """A .jsonl file of decisions, open for adding to it; only one process may have it open.

    Raises BadDecisions when it can't be opened, or somebody else has it open. Not safe for threads: the caller locks.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise BadDecisions(
                f"{path} can't be written", cause=str(error), remedy="let `decisions` name a file in a folder of yours"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise BadDecisions(
                f"{path} is being written by another `tunery review`",
                remedy="go on in its page, or end it with Ctrl-C first",
            ) from None
        content = path.read_bytes()
        self.decided, self._steps = replay(path, content)
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file, whole)

    @property
    def last(self) -> DecisionEdit | None:
        """What `undo` would undo."""
        return self._steps[-1] if self._steps else None

    def decide(self, id: str, decision: Decision) -> None:
        """Returns once it is on the disk. Raises OSError when it can't be; then nothing has changed."""
        self._write({"id": id, "decision": decision})
        self._steps.append(DecisionEdit(id, self.decided.get(id)))
        self.decided[id] = decision

    def undo(self) -> str | None:
        """Take back the newest decision that wasn't taken back yet; returns its row's id."""
        if not self._steps:
            return None
        step = self._steps[-1]
        self._write({"id": step.id, "decision": step.before, "undo": True})
        self._steps.pop()
        self.decided.pop(step.id, None)
        if step.before is not None:
            self.decided[step.id] = step.before
        return step.id

    def close(self) -> None:
        os.close(self._file)

    def _write(self, line: dict[str, Any]) -> None:
        end = os.fstat(self._file).st_size
        text = json.dumps({**line, "t": datetime.now(UTC).isoformat(timespec="seconds")}) + "\n"
        try:
            left = memoryview(text.encode())
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, end)  # a full disk: no half line for the next one to be glued to
            raise


# .xlsx


def _from_workbook(path: Path) -> dict[str, Decision]:
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        with path.open("rb") as file:
            book = load_workbook(file, read_only=True, data_only=True)
            rows = list(_cells(path, book))
    except (BadZipFile, InvalidFileException, ParseError, KeyError) as error:
        raise BadDecisions(
            f"{path} is no .xlsx workbook", cause=str(error), remedy="save it as an Excel workbook (.xlsx)"
        ) from None
    decided: dict[str, Decision] = {}
    for sheet, number, id, said in rows:
        if said is None or not str(said).strip():
            continue
        where = f"{path}, sheet `{sheet}`, row {number}"
        decision = _DECISION_OF.get(str(said).strip().lower())
        if decision is None:
            raise BadDecisions(
                f"{where}: `{said}` is no decision",
                cause="a decision is keep or drop",
                remedy="choose one, or empty the cell",
            )
        if not isinstance(id, str) or not id.strip():
            raise BadDecisions(
                f"{where}: `{id}` is no row's id",
                cause="the decision beside it belongs to no row; ids are text, and spreadsheets turn some into numbers",
                remedy="undo what changed the column `id`, or write the workbook anew with `tunery review --xlsx`",
            )
        key = id.strip()
        if decided.get(key, decision) != decision:
            raise BadDecisions(
                f"{where}: `{said}`, but `{decided[key]}` above, for the row {key}", remedy="remove one of the two"
            )
        decided[key] = decision
    return decided


def _cells(path: Path, book: Any) -> Iterator[tuple[str, int, object, object]]:
    """(sheet, row as the spreadsheet counts, id, decision) of every row below the header."""
    sheet = book[SHEET] if SHEET in book.sheetnames else book.worksheets[0]
    rows = all_rows(sheet, values_only=True)
    header = [str(name).strip().lower() if name is not None else "" for name in next(rows, ())]
    missing = [name for name in ("id", "decision") if name not in header]
    if missing:
        raise BadDecisions(
            f"{path}, sheet `{sheet.title}`, row 1: there is no column `{missing[0]}`",
            cause=f"its columns are: {', '.join(filter(None, header)) or 'none'}",
            remedy="keep the header that `tunery review --xlsx` wrote",
        )
    id_at, decision_at = header.index("id"), header.index("decision")
    for number, row in enumerate(rows, 2):
        padded = [*row, *[None] * (len(header) - len(row))]
        yield sheet.title, number, padded[id_at], padded[decision_at]
