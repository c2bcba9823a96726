"""Reading rows from the builtin corpus and from .jsonl and .json files. One bad line costs that line.

Works as a stream: no file is held in memory but a .json array, which can't be parsed in pieces.
"""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.data import python_docs
from tunery.data.columns import BadRow, Convert, NoShape, converter
from tunery.data.split import split_of
from tunery.spec import Dataset
from tunery.store.fingerprint import file_digest
from tunery.store.rows import Row, Shape, shape_of

BUILTIN = "builtin:python-docs"
ENDINGS = (".jsonl", ".json")
PROBED = 1000
"""Records of a file that are looked at before a run: enough to get past a head of bad ones, read in no time."""


@dataclass(frozen=True)
class Quarantined:
    """A line that can't be used."""

    source: str
    line: int
    reason: str
    excerpt: str


class BadSource(ValueError):
    """A dataset stage that can't work, found before anything runs. `field` is the stage's field that is to blame."""

    def __init__(self, field: str, message: str, cause: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.field, self.message, self.cause, self.remedy = field, message, cause, remedy


def check_source(stage: Dataset, folder: Path) -> None:
    """Raises BadSource when the source is missing, empty, of an unknown form, or its columns fit no shape."""
    if stage.source.startswith("builtin:"):
        if stage.source != BUILTIN:
            raise BadSource("source", f"there is no builtin source `{stage.source}`", remedy=f"known: {BUILTIN}")
        if stage.subset is None:
            raise BadSource(
                "source", f"`{BUILTIN}` needs a subset", remedy="add `subset:` texts, questions, preferences or prompts"
            )
        if stage.columns is not None:
            raise BadSource("columns", "a builtin source has no columns to name", remedy="remove `columns`")
        return
    if stage.subset is not None:
        raise BadSource("subset", "files have no subset", remedy="remove `subset`; it is for builtin sources")
    for path in find_files(stage, folder):
        if _first_usable(path, stage):
            return
    raise BadSource(
        "source",
        f"`{stage.source}` holds no row",
        cause="every file is empty, or no line of it can be read",
        remedy="give a file with at least one row",
    )


def find_files(stage: Dataset, folder: Path) -> list[Path]:
    """The files of a source, by name. Raises BadSource when there is none or one of an unknown form."""
    paths = [folder / found for found in sorted(glob.glob(stage.source, root_dir=folder, recursive=True))]
    if not paths:
        raise BadSource(
            "source",
            f"there is no file `{stage.source}`",
            cause=f"nothing matches {folder / stage.source}",
            remedy="paths start at the experiment's folder",
        )
    for path in paths:
        if path.is_dir() or path.suffix not in ENDINGS:
            what = "a folder" if path.is_dir() else f"a {path.suffix or 'file without ending'}"
            raise BadSource("source", f"`{path}` is {what}", remedy=f"name files that end in {' or '.join(ENDINGS)}")
    return paths


def source_identity(stage: Dataset, folder: Path) -> Any:
    """What the rows depend on besides the stage's fields: the files' content, or the interpreter."""
    if stage.source == BUILTIN:
        return python_docs.identity()
    return [file_digest(path) for path in find_files(stage, folder)]


def read_source(stage: Dataset, folder: Path, quarantine: Callable[[Quarantined], None]) -> Iterator[Row]:
    """Rows of the stage's split and limit, with group, source and line; not yet damaged, without ids."""
    rows = _builtin(stage) if stage.source == BUILTIN else _files(stage, folder, quarantine)
    yield from itertools.islice(rows, stage.limit)


def _wanted(stage: Dataset) -> Callable[[str], bool]:
    return lambda group: stage.split == "all" or split_of(group, stage.holdout) == stage.split


def _builtin(stage: Dataset) -> Iterator[Row]:
    assert stage.subset is not None, "check_source saw to it"
    for number, row in enumerate(python_docs.rows(stage.subset, _wanted(stage)), 1):
        yield {**row, "source": f"{BUILTIN}/{stage.subset}", "line": number}


def _files(stage: Dataset, folder: Path, quarantine: Callable[[Quarantined], None]) -> Iterator[Row]:
    wanted = _wanted(stage)
    for path in find_files(stage, folder):
        name = str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)
        converters: dict[tuple[str, ...], Convert] = {}
        for line, raw, parsed in _records(path):
            try:
                row = _convert(parsed, stage, converters)
            except (BadRow, NoShape) as error:
                quarantine(Quarantined(name, line, str(error), raw[:200]))
                continue
            group = row["text"] if row.get("text") else _first_question(row)
            if wanted(group):
                yield {**row, "group": group, "source": name, "line": line}


def _convert(parsed: Any, stage: Dataset, converters: dict[tuple[str, ...], Convert]) -> Row:
    if isinstance(parsed, Exception):
        raise BadRow(str(parsed))
    if not isinstance(parsed, dict):
        raise BadRow(f"a row must be an object, this is {type(parsed).__name__}")
    key = tuple(parsed)
    if key not in converters:
        converters[key] = converter(parsed, stage.columns)
    return converters[key](parsed)


def _first_question(row: Row) -> str:
    turns = row["messages"]
    return str(next((turn["content"] for turn in turns if turn["role"] == "user"), turns[0]["content"]))


def _records(path: Path) -> Iterator[tuple[int, str, Any]]:
    """(line, raw text, parsed value or the error) of every record; blank lines are none."""
    if path.suffix == ".json":
        yield from _array(path)
        return
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if not raw.strip():
                continue
            yield number, raw.decode("utf-8", "replace").rstrip("\r\n"), _parse(raw)


def _array(path: Path) -> Iterator[tuple[int, str, Any]]:
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    if not raw.strip():
        return
    parsed = _parse(raw)
    if isinstance(parsed, Exception):
        yield 1, raw[:200].decode("utf-8", "replace"), parsed
        return
    for number, record in enumerate(parsed if isinstance(parsed, list) else [parsed], 1):
        yield number, json.dumps(record, ensure_ascii=False)[:200], record


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(f"not UTF-8: byte {raw[error.start]:#04x} at position {error.start}")
    except json.JSONDecodeError as error:
        return BadRow(f"not JSON: {error.msg} at column {error.colno}")
    except ValueError:  # Python reads no whole number of more than 4,300 digits
        return BadRow("not JSON that can be read: a number is too long")
    except RecursionError:
        return BadRow("not JSON that can be read: nested too deep")


def _first_usable(path: Path, stage: Dataset) -> bool:
    """Whether some record can be read. Raises BadSource when the columns of none of the first `PROBED` fit."""
    misfit: NoShape | None = None
    for _, _, parsed in itertools.islice(_records(path), PROBED):
        if isinstance(parsed, dict):
            try:
                converter(parsed, stage.columns)
            except NoShape as error:
                misfit = misfit or error
            else:
                return True
    if misfit is not None:
        raise BadSource(
            "columns" if stage.columns else "source",
            f"the columns of `{path.name}` don't fit",
            cause=str(misfit),
            remedy="name them, such as `columns: {prompt: q, completion: a}` or `columns: {text: body}`",
        )
    return False


def first_shape(stage: Dataset, folder: Path) -> Shape:
    """The shape of a source's first usable row. Raises BadSource when there is none."""
    if stage.source == BUILTIN:
        shapes: dict[str, Shape] = {"texts": "text", "preferences": "preference", "prompts": "prompt"}
        return shapes.get(stage.subset or "", "conversation")
    unlimited = stage.model_copy(update={"split": "all", "limit": 1})
    check_source(stage, folder)
    for row in read_source(unlimited, folder, lambda line: None):
        return shape_of(row)
    raise BadSource("source", f"`{stage.source}` holds no usable row")
