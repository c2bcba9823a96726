"""`tunery store verify`: compare the files of artifacts with their checksums."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tunery.errors import TuneryError
from tunery.interrupt import STOP
from tunery.store import Store
from tunery.store.atomic_write import read_json
from tunery.store.checksums import (
    CHECKSUMS,
    MANIFEST,
    RUNTIME_STATS,
    FileChecksum,
    files_of,
    hashing_threads,
    read_checksums,
    sha256_of,
    size_and_time,
)
from tunery.store_commands.run_references import StageFolder, check_is_store, matching, stage_folders

BATCH_BYTES = 1 << 30
BATCH_ARTIFACTS = 256
"""Artifacts are verified in batches of about this size, whose files are read by several threads."""
MAX_NAMED = 3
"""Number of damaged artifacts that an error names."""


@dataclass(frozen=True)
class VerifiedArtifact:
    path: Path
    has_checksums: bool
    unreadable: tuple[str, ...] = ()
    """Files of the artifact itself that are missing or truncated: manifest.json, runtime_stats.json, checksums.json."""
    missing: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    additional: tuple[str, ...] = ()

    @property
    def damaged(self) -> bool:
        return bool(self.unreadable or self.missing or self.changed or self.additional)

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "has_checksums": self.has_checksums,
            "damaged": self.damaged,
            "unreadable": list(self.unreadable),
            "missing": list(self.missing),
            "changed": list(self.changed),
            "additional": list(self.additional),
        }


@dataclass(frozen=True)
class Verification:
    artifacts: tuple[VerifiedArtifact, ...]
    bytes: int
    """Bytes that were read."""
    seconds: float

    @property
    def damaged(self) -> list[VerifiedArtifact]:
        return [artifact for artifact in self.artifacts if artifact.damaged]

    @property
    def without_checksums(self) -> list[VerifiedArtifact]:
        return [artifact for artifact in self.artifacts if not artifact.has_checksums and not artifact.damaged]

    def as_json(self) -> dict[str, Any]:
        return {
            "damaged": len(self.damaged),
            "without_checksums": len(self.without_checksums),
            "bytes": self.bytes,
            "seconds": self.seconds,
            "artifacts": [artifact.as_json() for artifact in self.artifacts],
        }

    def raise_if_damaged(self) -> None:
        """Raise TuneryError if an artifact is damaged."""
        if not self.damaged:
            return
        names = " ".join(str(artifact.path) for artifact in self.damaged[:MAX_NAMED])
        more = f" and {len(self.damaged) - MAX_NAMED} more" if len(self.damaged) > MAX_NAMED else ""
        raise TuneryError(
            f"{len(self.damaged)} of {len(self.artifacts)} artifacts are damaged",
            cause="a disk error, an incomplete copy of the store, or a change by hand",
            remedy=f"delete these folders ({names}{more}), then give the command `tunery run` of a run that uses them: "
            "it rebuilds them",
        )


@dataclass
class Progress:
    """Bytes read so far, counted by all threads."""

    total: int
    done: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, count: int) -> None:
        with self._lock:
            self.done += count


def verify_artifacts(
    store: Store, requested: Sequence[str] = (), watch: Callable[[Progress], object] = lambda progress: None
) -> Verification:
    """Verify the artifacts with these fingerprints (or unique prefixes of them), or all.

    `watch` is called with the progress before the first file is read. Raises RequestError if the folder is not a store
    or has no such artifact.
    """
    check_is_store(store)
    artifacts = stage_folders(store.artifacts)
    if requested:
        artifacts = list(dict.fromkeys(matching(artifacts, requested, store.root)))
    sizes = {artifact: _size(artifact) for artifact in artifacts}
    progress = Progress(sum(sizes.values()))
    watch(progress)
    started = time.monotonic()
    with hashing_threads() as pool:
        verified = [result for batch in _batches(artifacts, sizes) for result in _verify_batch(batch, pool, progress)]
    return Verification(tuple(verified), progress.done, time.monotonic() - started)


def _size(artifact: StageFolder) -> int:
    """Return the bytes to read."""
    try:
        return size_and_time(artifact.location)[0] if os.path.exists(f"{artifact.location}/{CHECKSUMS}") else 0
    except FileNotFoundError:  # removed in the meantime
        return 0


def _batches(artifacts: Sequence[StageFolder], sizes: dict[StageFolder, int]) -> Iterator[list[StageFolder]]:
    batch: list[StageFolder] = []
    size = 0
    for artifact in artifacts:
        batch.append(artifact)
        size += sizes[artifact]
        if len(batch) == BATCH_ARTIFACTS or size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _verify_batch(
    artifacts: Sequence[StageFolder], pool: ThreadPoolExecutor, progress: Progress
) -> Iterator[VerifiedArtifact]:
    """Yield the results of the artifacts that still exist."""
    listed = {artifact: read_checksums(artifact.path) or [] for artifact in artifacts}

    def state(task: tuple[StageFolder, FileChecksum]) -> str:
        artifact, file = task
        if STOP.requested:
            return ""  # the main thread raises
        return _file_state(artifact.path / file.path, file, progress)

    tasks = [(artifact, file) for artifact, files in listed.items() for file in files]
    states = dict(zip(((artifact, file.path) for artifact, file in tasks), pool.map(state, tasks), strict=True))
    STOP.check()
    for artifact in artifacts:
        try:
            present = files_of(artifact.path)
        except FileNotFoundError:  # removed in the meantime
            continue
        has_checksums = (artifact.path / CHECKSUMS).exists()
        paths = [file.path for file in listed[artifact]]
        unreadable = [name for name in (MANIFEST, RUNTIME_STATS) if read_json(artifact.path / name) is None]
        if has_checksums and not listed[artifact]:
            unreadable.append(CHECKSUMS)
        yield VerifiedArtifact(
            artifact.path,
            has_checksums,
            tuple(unreadable),
            tuple(path for path in paths if states[artifact, path] == "missing"),
            tuple(path for path in paths if states[artifact, path] == "changed"),
            tuple(sorted({*present} - {*paths})) if listed[artifact] else (),
        )


def _file_state(path: Path, file: FileChecksum, progress: Progress) -> str:
    """Return "missing", "changed", or "" for a file that is as it was. A file of another size is not read."""
    try:
        if path.stat().st_size != file.bytes:
            progress.add(file.bytes)
            return "changed"
        return "" if sha256_of(path, progress.add)[1] == file.sha256 else "changed"
    except (FileNotFoundError, NotADirectoryError):
        progress.add(file.bytes)
        return "missing"
