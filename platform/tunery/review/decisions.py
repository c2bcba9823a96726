"""Review decisions by row id: read from .jsonl or .xlsx, and appended to a .jsonl file.

A line of the .jsonl file is {"id", "decision": "keep" | "drop" | null, "t"}. The last line of an id counts; null
revokes the decision. A line with "undo": true undoes the newest decision. The file is append-only and synced to disk
before the reviewer sees the next row, so neither a closed tab nor a killed process loses a decision.
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
_DECISION_BY_TEXT: dict[str, Decision] = {decision: decision for decision in DECISIONS}
SHEET = "review"
"""Name of the sheet with the decisions."""


class BadDecisions(RequestError):
    """The decision file can't be read, or a cell or line in it is not a valid decision."""


def decisions_path(stage: Review, folder: Path) -> Path:
    return folder / Path(stage.decisions).expanduser()


def decisions_identity(stage: Review, folder: Path) -> str | None:
    """Return a hash of the decisions, independent of file format and timestamps; None if there are no decisions."""
    decisions = read_decisions(decisions_path(stage, folder))
    return hashlib.sha256(json.dumps(sorted(decisions.items())).encode()).hexdigest() if decisions else None


def read_decisions(path: Path) -> dict[str, Decision]:
    """Return the decisions by row id; none if the file doesn't exist. Raises BadDecisions."""
    try:
        if path.suffix == ".xlsx":
            return _read_workbook(path)
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
    """A decision that can be undone."""

    id: str
    previous: Decision | None
    """The decision on `id` before this one."""


def replay(path: Path, content: bytes) -> tuple[dict[str, Decision], list[DecisionEdit]]:
    """Return the decisions after the last line, and the edits that can be undone, newest last.

    A last line without a newline is ignored: its write was interrupted and never acknowledged.
    """
    decisions: dict[str, Decision] = {}
    edits: list[DecisionEdit] = []
    for number, line in enumerate(content.split(b"\n")[:-1], 1):
        if not line.strip():
            continue
        id, decision, undo = _parse_line(path, number, line.removeprefix(b"\xef\xbb\xbf"))
        if undo:
            if edits:
                edits.pop()
        else:
            edits.append(DecisionEdit(id, decisions.get(id)))
        decisions.pop(id, None)
        if decision is not None:
            decisions[id] = decision
    return decisions, edits


def _parse_line(path: Path, number: int, line: bytes) -> tuple[str, Decision | None, bool]:
    try:
        entry: Any = json.loads(line)
        id, decision, undo = entry["id"], entry["decision"], entry.get("undo", False)
    except (ValueError, KeyError, TypeError, AttributeError):
        id, decision, undo = None, None, False
    if not isinstance(id, str) or not id or (decision is not None and decision not in DECISIONS):
        excerpt = line[:120].decode(errors="replace").strip()
        raise BadDecisions(
            f"{path}:{number}: `{excerpt}` is not a decision",
            cause='a line is {"id": "<the row\'s id>", "decision": "keep" or "drop", or null to revoke it}',
            remedy="correct the line or remove it",
        )
    return id, cast("Decision | None", decision), bool(undo)


class DecisionLog:
    """A .jsonl file of decisions, opened for appending; only one process may have it open.

    Raises BadDecisions if it can't be opened or another process has it open. Not thread-safe.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise BadDecisions(
                f"{path} can't be written", cause=str(error), remedy="set `decisions` to a file in a writable folder"
            ) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._file)
            raise BadDecisions(
                f"{path} is being written by another `tunery review`",
                remedy="continue in its page, or stop it with Ctrl-C",
            ) from None
        content = path.read_bytes()
        self.decisions, self._edits = replay(path, content)
        complete_size = content.rfind(b"\n") + 1
        if complete_size < len(content):
            os.ftruncate(self._file, complete_size)

    @property
    def last_edit(self) -> DecisionEdit | None:
        """The edit that `undo` would undo."""
        return self._edits[-1] if self._edits else None

    def decide(self, id: str, decision: Decision) -> None:
        """Record a decision; returns once it is on disk. Raises OSError if it can't be written, and changes nothing."""
        self._append({"id": id, "decision": decision})
        self._edits.append(DecisionEdit(id, self.decisions.get(id)))
        self.decisions[id] = decision

    def undo(self) -> str | None:
        """Undo the newest decision that was not undone yet; return its row id, or None if there is none."""
        if not self._edits:
            return None
        edit = self._edits[-1]
        self._append({"id": edit.id, "decision": edit.previous, "undo": True})
        self._edits.pop()
        self.decisions.pop(edit.id, None)
        if edit.previous is not None:
            self.decisions[edit.id] = edit.previous
        return edit.id

    def close(self) -> None:
        os.close(self._file)

    def _append(self, entry: dict[str, Any]) -> None:
        size_before = os.fstat(self._file).st_size
        text = json.dumps({**entry, "t": datetime.now(UTC).isoformat(timespec="seconds")}) + "\n"
        try:
            remaining = memoryview(text.encode())
            while remaining:
                remaining = remaining[os.write(self._file, remaining) :]
            os.fsync(self._file)
        except OSError:
            os.ftruncate(self._file, size_before)  # a full disk: remove the partial line
            raise


# .xlsx


def _read_workbook(path: Path) -> dict[str, Decision]:
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    try:
        with path.open("rb") as file:
            book = load_workbook(file, read_only=True, data_only=True)
            rows = list(_decision_cells(path, book))
    except (BadZipFile, InvalidFileException, ParseError, KeyError) as error:
        raise BadDecisions(
            f"{path} is not an .xlsx workbook", cause=str(error), remedy="save it as an Excel workbook (.xlsx)"
        ) from None
    decisions: dict[str, Decision] = {}
    for sheet, number, id, cell in rows:
        if cell is None or not str(cell).strip():
            continue
        location = f"{path}, sheet `{sheet}`, row {number}"
        decision = _DECISION_BY_TEXT.get(str(cell).strip().lower())
        if decision is None:
            raise BadDecisions(
                f"{location}: `{cell}` is not a decision",
                cause="a decision is keep or drop",
                remedy="choose one, or empty the cell",
            )
        if not isinstance(id, str) or not id.strip():
            raise BadDecisions(
                f"{location}: `{id}` is not a row id",
                cause="its decision belongs to no row; ids are text, and spreadsheets convert some to numbers",
                remedy="restore the column `id`, or write the workbook again with `tunery review --xlsx`",
            )
        key = id.strip()
        if decisions.get(key, decision) != decision:
            raise BadDecisions(
                f"{location}: `{cell}` contradicts `{decisions[key]}` above, for the row {key}",
                remedy="remove one of the two",
            )
        decisions[key] = decision
    return decisions


def _decision_cells(path: Path, book: Any) -> Iterator[tuple[str, int, object, object]]:
    """Yield (sheet, row number in the spreadsheet, id, decision) of every row below the header."""
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
    id_column, decision_column = header.index("id"), header.index("decision")
    for number, row in enumerate(rows, 2):
        padded = [*row, *[None] * (len(header) - len(row))]
        yield sheet.title, number, padded[id_column], padded[decision_column]
