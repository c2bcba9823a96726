"""Which runs of a store refer to which artifacts.

A run refers to an artifact if its event log contains the fingerprint. Every stage that a run starts or reuses is logged
with its fingerprint before its output is used, those of trials too, and those of earlier invocations and edits of the
experiment stay in the log. The log is searched for fingerprints as such, not for particular events, so events of
plugins and of other versions of tunery count as well.

Earlier versions did not log the fingerprint of a search. A run also refers to a search if it has one of its trials:
their names are hashes of their values.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from pathlib import Path

from tunery.errors import RequestError
from tunery.store import Store
from tunery.store.checksums import MANIFEST

SEARCH = "search"
"""Kind of the artifact of a search."""
MAX_READ = 1 << 16
"""Larger files are memory-mapped."""
_REFERENCE = re.compile(rb'"(trial-[0-9a-f]{8}|[0-9a-f]{16})"')
"""A trial or a fingerprint in JSON."""
_FOLDER = re.compile(r"([^.].*)-([0-9a-f]{16})")
"""Name of the folder of an artifact, and of its work directory and lease."""


@dataclass(frozen=True)
class StageFolder:
    """A folder that is named by the kind and fingerprint of a stage. Paths are strings: for 100,000 folders pathlib
    takes longer than the file system."""

    kind: str
    fingerprint: str
    parent: str

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.fingerprint}"

    @property
    def location(self) -> str:
        return f"{self.parent}/{self.kind}-{self.fingerprint}"

    @property
    def path(self) -> Path:
        return Path(self.location)


def stage_folders(folder: Path) -> list[StageFolder]:
    """Return the artifacts in `artifacts/`, or the work directories in `work/`, sorted by name. Other files and folders
    are none of tunery's."""
    found, parent = [], str(folder)
    if folder.is_dir():
        with os.scandir(folder) as entries:
            for entry in entries:
                match = _FOLDER.fullmatch(entry.name)
                if match is not None and entry.is_dir(follow_symlinks=False):
                    found.append(StageFolder(match[1], match[2], parent))
    return sorted(found, key=lambda stage: (stage.kind, stage.fingerprint))


def run_references(store: Store) -> dict[str, set[str]]:
    """Return the fingerprints and trials in the event log of each run, by run."""
    if not store.runs.is_dir():
        return {}
    return {
        run.name: set().union(*map(names_in, sorted((run / "events").glob("*.jsonl"))))
        for run in sorted(store.runs.iterdir())
        if run.is_dir()
    }


def names_in(path: str | Path) -> set[str]:
    """Return the fingerprints and trials in a JSON file; none if the file does not exist."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return set()
    try:
        size = os.fstat(descriptor).st_size
        if size <= MAX_READ:
            return _names(os.read(descriptor, MAX_READ))
        with mmap.mmap(descriptor, size, access=mmap.ACCESS_READ) as content:
            return _names(content)
    finally:
        os.close(descriptor)


def _names(content: bytes | mmap.mmap) -> set[str]:
    return {match.decode() for match in set(_REFERENCE.findall(content))}


def trials_of(stage: StageFolder) -> set[str]:
    """Return the trials of a search, from its artifact or its work directory; none for other kinds."""
    if stage.kind != SEARCH:
        return set()
    names = names_in(f"{stage.location}/{MANIFEST}") | names_in(f"{stage.location}/journal.jsonl")
    return {name for name in names if name.startswith("trial-")}


def is_in(names: Set[str], stage: StageFolder) -> bool:
    """Whether `names`, those in event logs, refer to an artifact or a work directory."""
    return stage.fingerprint in names or not names.isdisjoint(trials_of(stage))


def referring_runs(references: dict[str, set[str]], stages: Iterable[StageFolder]) -> dict[StageFolder, list[str]]:
    """Return the runs that refer to each artifact, sorted."""
    runs: dict[str, list[str]] = {}
    for run, names in references.items():
        for name in names:
            runs.setdefault(name, []).append(run)
    result = {stage: runs.get(stage.fingerprint, []) for stage in stages}
    for stage in result:
        if trials := trials_of(stage):
            result[stage] = sorted({run for name in trials for run in runs.get(name, ())} | {*result[stage]})
    return result


def check_is_store(store: Store) -> None:
    """Raise RequestError if the folder is not a store."""
    if not store.artifacts.is_dir() and not store.runs.is_dir():
        raise RequestError(
            f"{store.root} is not a store",
            cause="it has neither artifacts/ nor runs/" if store.root.is_dir() else "there is no such folder",
            remedy="give the folder of a store with --store",
        )


def matching(artifacts: Iterable[StageFolder], requested: Iterable[str], root: Path) -> Iterator[StageFolder]:
    """Yield the artifacts with the requested fingerprints, in the requested order: complete, or a unique prefix, or
    with their kind. Raises RequestError if none or several match."""
    known = list(artifacts)
    for word in requested:
        found = [stage for stage in known if stage.fingerprint.startswith(word) or stage.name.startswith(word)]
        if not found:
            raise RequestError(f"no artifact `{word}` in {root}", remedy="`tunery store ls` lists them")
        if len(found) > 1:
            names = ", ".join(stage.name for stage in found[:5]) + (", .." if len(found) > 5 else "")
            raise RequestError(f"`{word}` matches {len(found)} artifacts", cause=names, remedy="give a longer prefix")
        yield found[0]
