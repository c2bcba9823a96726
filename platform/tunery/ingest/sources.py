"""Resolves the sources of a dataset stage to files, hub datasets and the builtin corpus, and validates its fields."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.errors import RequestError
from tunery.ingest import python_docs
from tunery.ingest.filesystem import REMOTE, CorruptFile, File, UnavailableFile, find
from tunery.ingest.formats import ENDINGS, format_of
from tunery.ingest.formats.hub import PREFIX, AmbiguousDataset, HubDataset, saved_files
from tunery.spec import Dataset

BUILTIN = "builtin:python-docs"


class BadSource(ValueError):
    """A dataset stage is invalid; raised before the run starts. `field` is the invalid field of the stage."""

    def __init__(self, field: str, message: str, cause: str = "", remedy: str = "") -> None:
        super().__init__(field, message, cause, remedy)  # pickle rebuilds the exception from these arguments
        self.field, self.message, self.cause, self.remedy = field, message, cause, remedy

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Builtin:
    name: str

    def identity(self) -> Any:
        """Identity of the Python version whose documentation is read."""
        return python_docs.identity()


SourcePart = File | HubDataset | Builtin
"""A file, hub dataset or builtin corpus that a source consists of; each has a `name` and an `identity()`."""


def sources_of(stage: Dataset) -> tuple[str, ...]:
    return (stage.source,) if isinstance(stage.source, str) else stage.source


def resolve_sources(stage: Dataset, folder: Path) -> list[SourcePart]:
    """Return the parts of the stage's sources in order, without duplicates. Raises BadSource if a source doesn't exist,
    has an unknown format or is unavailable."""
    parts: dict[SourcePart, None] = {}
    for source in sources_of(stage):
        try:
            source_parts = _resolve_source(source, stage, folder)
        except UnavailableFile as error:
            raise unavailable_source(error) from error
        except AmbiguousDataset as error:
            raise ambiguous_dataset(error) from error
        except CorruptFile as error:
            raise BadSource("source", f"`{source}` can't be read", cause=str(error)) from error
        parts |= dict.fromkeys(source_parts)
    return list(parts)


def unavailable_source(error: UnavailableFile) -> BadSource:
    return BadSource(
        "source",
        f"{error}",
        cause="the file can't be read, or the network request failed",
        remedy="check permissions, the network, and the credentials in the environment",
    )


def ambiguous_dataset(error: AmbiguousDataset) -> BadSource:
    known = ", ".join(error.known[:20])
    return BadSource(error.field, str(error), cause=f"known: {known}", remedy=f"select one with `{error.field}:`")


def source_identity(stage: Dataset, folder: Path) -> Any:
    """Return the identity of the source content, which is part of the cache key. Raises RequestError."""
    try:
        return [part.identity() for part in resolve_sources(stage, folder)]
    except (BadSource, UnavailableFile) as error:
        cause = getattr(error, "cause", "")
        raise RequestError(str(error), cause=cause, remedy=getattr(error, "remedy", "")) from error


def _resolve_source(source: str, stage: Dataset, folder: Path) -> list[SourcePart]:
    if source.startswith("builtin:"):
        if source != BUILTIN:
            raise BadSource("source", f"there is no builtin source `{source}`", remedy=f"known: {BUILTIN}")
        return [Builtin(f"{source}/{stage.subset}")]
    if source.startswith(PREFIX):
        return [HubDataset(source, stage.config, stage.hub_split, stage.revision)]
    if "://" in source and not source.startswith(REMOTE):
        raise BadSource(
            "source", f"`{source}` has an unknown scheme", remedy="use a path, s3://, gs:// or hub:org/name"
        )
    path = folder / os.path.expanduser(source)
    if not source.startswith(REMOTE) and path.is_dir():
        saved = saved_files(path, folder, stage.hub_split)
        if saved is not None:
            return list(saved)
    files = find(source, folder)
    if not files:
        raise _not_found_error(source, path)
    readable: list[SourcePart] = []
    for file in files:
        if format_of(file, stage) is not None:
            readable.append(file)
        elif not file.from_listing:
            raise _unknown_format_error(file)
    if not readable:
        raise BadSource("source", f"no file in `{source}` has a known ending", remedy=f"known: {' '.join(ENDINGS)}")
    return readable


def _not_found_error(source: str, path: Path) -> BadSource:
    if source.startswith(REMOTE):
        return BadSource("source", f"there is no file `{source}`", remedy="check bucket and path")
    if path.is_dir():
        return BadSource("source", f"there is no file in the folder `{source}`", cause=f"{path} is empty")
    return BadSource(
        "source",
        f"there is no file `{source}`",
        cause=f"nothing matches {path}",
        remedy="paths are relative to the experiment's folder; a pattern matches files, not folders",
    )


def _unknown_format_error(file: File) -> BadSource:
    ending = file.endings[0]
    hint = "; save it as .xlsx" if ending in (".xls", ".ods") else ""
    return BadSource(
        "source",
        f"`{file.name}` is a {ending or 'file without ending'}",
        remedy=f"use files that end in {', '.join(ENDINGS)}, or set `format:`{hint}",
    )


def validate_source_fields(stage: Dataset, parts: list[SourcePart]) -> None:
    """Raises BadSource if a field is set that does not apply to the parts, or a required one is missing."""
    builtin = any(isinstance(part, Builtin) for part in parts)
    hub = any(isinstance(part, HubDataset) for part in parts)
    files = [part for part in parts if isinstance(part, File)]
    formats = {format_of(file, stage) for file in files}
    if builtin and stage.subset is None:
        remedy = "add `subset:` texts, questions, preferences, corrupted or prompts"
        raise BadSource("source", f"`{BUILTIN}` needs a subset", remedy=remedy)
    for field in ("columns", "roles", "message_keys"):
        if builtin and getattr(stage, field) is not None:
            raise BadSource(field, f"`{field}` does not apply to a builtin source", remedy=f"remove `{field}`")
    if stage.subset is not None and not builtin:
        raise BadSource("subset", "`subset` applies to builtin sources only", remedy="remove `subset`")
    saved = any(file.endings[0] == ".arrow" for file in files)
    for field, applies, what in (
        ("format", bool(files), "files"),
        ("sheet", "xlsx" in formats, "Excel files"),
        ("sample_by", "text" in formats, "plain texts"),
        ("config", hub, "hub datasets"),
        ("revision", hub, "hub datasets"),
        ("hub_split", hub or saved, "hub datasets and saved DatasetDicts"),
    ):
        if getattr(stage, field) is not None and not applies:
            raise BadSource(field, f"`{field}` applies to {what}, and the source has none", remedy=f"remove `{field}`")
