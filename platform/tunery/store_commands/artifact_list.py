"""`tunery store ls`: the artifacts of a store with size, age and the runs that refer to them.

For 100,000 artifacts this must not read their content: kind and fingerprint are in the name of the folder, the size is
at the beginning of checksums.json, and its age is that of this file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunery.store import Store
from tunery.store.checksums import size_and_time
from tunery.store_commands.run_references import (
    check_is_store,
    referring_runs,
    run_references,
    stage_folders,
)

Order = Literal["size", "age", "name"]
_ORDERS: dict[str, Callable[[ListedArtifact], Any]] = {
    "size": lambda artifact: -artifact.bytes,
    "age": lambda artifact: artifact.created,
}
"""Largest or oldest first; equal ones are sorted by name."""


@dataclass(frozen=True)
class ListedArtifact:
    kind: str
    fingerprint: str
    bytes: int
    created: float
    """When it was committed, in seconds since the epoch."""
    runs: tuple[str, ...]
    """Runs of the store that refer to it."""

    def as_json(self, store: Path) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "fingerprint": self.fingerprint,
            "bytes": self.bytes,
            "created": self.created,
            "runs": list(self.runs),
            "path": f"{store}/artifacts/{self.kind}-{self.fingerprint}",
        }


@dataclass(frozen=True)
class ArtifactList:
    store: Path
    artifacts: tuple[ListedArtifact, ...]
    now: float

    @property
    def bytes(self) -> int:
        return sum(artifact.bytes for artifact in self.artifacts)

    def as_json(self) -> dict[str, Any]:
        return {
            "store": str(self.store),
            "bytes": self.bytes,
            "artifacts": [artifact.as_json(self.store) for artifact in self.artifacts],
        }


def list_artifacts(store: Store, *, kind: str | None = None, order: Order = "name") -> ArtifactList:
    """Return the artifacts, those of one kind if `kind` is given. Raises RequestError if the folder is not a store."""
    check_is_store(store)
    stages = [stage for stage in stage_folders(store.artifacts) if kind in (None, stage.kind)]
    artifacts = []
    for stage, runs in referring_runs(run_references(store), stages).items():
        try:
            size, created = size_and_time(stage.location)
        except FileNotFoundError:  # removed in the meantime
            continue
        artifacts.append(ListedArtifact(stage.kind, stage.fingerprint, size, created, tuple(runs)))
    if order in _ORDERS:
        artifacts.sort(key=_ORDERS[order])
    return ArtifactList(store.root, tuple(artifacts), time.time())
