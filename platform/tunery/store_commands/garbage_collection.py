"""`tunery store gc`: remove what no run needs.

Removed are

- artifacts that no run in the store refers to (run_references.py), except the inputs of artifacts that are kept;
- work directories of stages that are complete, or that no run refers to. Those that a run refers to have checkpoints
  from which it resumes, and are removed with `unfinished` only;
- leases whose owner is dead, and temporary files of processes that were killed.

Not removed are runs, and the caches `scores/` and `tokenized/`: their content is shared by all experiments, belongs to
no run, and scores may have taken days to compute. To have gc remove the artifacts of a run, delete the folder of the
run first.

A run may reuse any artifact, also one that no run refers to, and logs that only when it gets to that stage. So while a
run is active, no artifact is removed, and no work directory that a run refers to. To also exclude runs that start at
the same time, gc holds a lease while it removes: a run that has acquired its own lease waits until that of gc is free,
and gc looks for active runs after it has acquired its lease. So that such a run waits for a moment only, artifacts and
work directories are renamed first and deleted after the lease is released; each is renamed under its own lease, which
whoever builds it would hold.

The log of a run has a stage before the stage writes anything, and the folders are listed before the logs are read.
So a work directory that a run creates meanwhile is never taken for one that no run refers to.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tunery.errors import RequestError
from tunery.store import Lease, LeaseHeld, Store, live_owners
from tunery.store.artifacts import GC_LEASE, read_artifact
from tunery.store.checksums import MANIFEST
from tunery.store_commands.run_references import (
    StageFolder,
    check_is_store,
    is_in,
    names_in,
    run_references,
    stage_folders,
    trials_of,
)

DELETED = ".deleted-"
"""Beginning of the names of folders in artifacts/ and work/ with what is being deleted. If gc is killed, the next one
deletes the rest."""
Notify = Callable[[str], None]


@dataclass(frozen=True)
class Removal:
    """A file or folder that is removed."""

    what: Literal["artifact", "work directory", "lease", "temporary"]
    path: Path
    bytes: int
    """Space that it frees: files with other hard links take no space of their own."""
    reason: str

    def as_json(self) -> dict[str, Any]:
        return {"what": self.what, "path": str(self.path), "bytes": self.bytes, "reason": self.reason}


@dataclass(frozen=True)
class GcResult:
    store: Path
    dry_run: bool
    removals: tuple[Removal, ...]
    kept: tuple[Removal, ...]
    """What would have been removed if no run was active."""
    active_runs: dict[str, str]
    """The owner of each active run, by run."""
    held: tuple[Path, ...] = ()
    """Artifacts and work directories that a process is building."""

    @property
    def bytes(self) -> int:
        return sum(removal.bytes for removal in self.removals)

    def as_json(self) -> dict[str, Any]:
        return {
            "store": str(self.store),
            "dry_run": self.dry_run,
            "bytes": self.bytes,
            "removed": [removal.as_json() for removal in self.removals],
            "kept_for_active_runs": [removal.as_json() for removal in self.kept],
            "active_runs": self.active_runs,
            "held": [str(path) for path in self.held],
        }


def collect_garbage(
    store: Store, *, dry_run: bool = False, unfinished: bool = False, notify: Notify = lambda message: None
) -> GcResult:
    """Remove what no run needs, or with `dry_run` only return what would be removed, and write nothing.

    unfinished: also remove the checkpoints of interrupted stages that a run could resume. Raises RequestError if the
    folder is not a store, or has artifacts but no run.
    """
    check_is_store(store)
    _check_has_runs(store)
    leases = _Leases(store, notify := _without_repetitions(notify))
    if dry_run:
        return _find_garbage(store, leases, unfinished=unfinished, dry_run=True)
    with store.gc_lease(lambda owner: notify(f"waiting for another `tunery store gc`: {owner}")):
        garbage = _find_garbage(store, leases, unfinished=unfinished, dry_run=False)
        notify(f"removing {len(garbage.removals):,} files and folders")
        removed, held, folders = _remove(garbage, leases)
    for folder in folders:
        shutil.rmtree(folder)
    return GcResult(store.root, False, tuple(removed), garbage.kept, garbage.active_runs, (*garbage.held, *held))


def _without_repetitions(notify: Notify) -> Notify:
    """Return a function that calls `notify` if the message differs from the last one."""
    last = ""

    def notify_once(message: str) -> None:
        nonlocal last
        if message != last:
            notify(message)
        last = message

    return notify_once


def _check_has_runs(store: Store) -> None:
    runs = [path for path in store.runs.iterdir() if path.is_dir()] if store.runs.is_dir() else []
    if not runs and (artifacts := stage_folders(store.artifacts)):
        raise RequestError(
            f"{store.root} has no run, so all of its {len(artifacts):,} artifacts would be removed",
            cause="artifacts that no run in runs/ refers to are removed, and it may be a copy without its runs",
            remedy=f"if you need none of them, delete {store.artifacts}",
        )


class _Leases:
    """The leases of the store. Finding out whether owners on other hosts are alive may take a minute, and happens
    before gc holds its own lease."""

    def __init__(self, store: Store, notify: Notify) -> None:
        self._store = store
        self.folder = store.leases
        self._by_path: dict[Path, Lease] = {}
        self._notify = notify
        self.active_runs()
        self.live_stages()

    def active_runs(self) -> dict[str, str]:
        """Return the owner of each active run."""
        paths = sorted(self._store.runs.glob("*/lease"))
        return {path.parent.name: owner for path, owner in self._live(paths).items()}

    def live_stages(self) -> dict[Path, str]:
        """Return the owner of each lease in leases/ whose owner is alive."""
        return self._live(self.stage_leases())

    def stage_leases(self) -> list[Path]:
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(
            path for path in paths if path.suffix != ".lock" and path.name[0] != "." and path.name != GC_LEASE
        )

    def _live(self, paths: Sequence[Path]) -> dict[Path, str]:
        leases = [self.lease(path) for path in paths]
        return {lease.path: owner for lease, owner in live_owners(leases, self._wait).items()}

    def _wait(self, owners: Iterable[str]) -> None:
        self._notify(f"waiting for a heartbeat of {', '.join(owners)}")

    def lease(self, path: Path) -> Lease:
        """Return the lease at `path`, which remembers the last heartbeat that was seen."""
        return self._by_path.setdefault(path, Lease(path))

    def of_stage(self, name: str) -> Lease:
        """Return the lease of an artifact or work directory."""
        return self.lease(self.folder / name)


def _find_garbage(store: Store, leases: _Leases, *, unfinished: bool, dry_run: bool) -> GcResult:
    # In this order, see above.
    artifacts, work_dirs = stage_folders(store.artifacts), stage_folders(store.root / "work")
    active_runs, live = leases.active_runs(), leases.live_stages()
    referenced = set().union(*run_references(store).values())
    sizes = _FreedBytes()
    removals: list[Removal] = []
    kept: list[Removal] = []

    def add(what: Literal["artifact", "work directory", "temporary"], path: Path, reason: str, safe: bool) -> None:
        """`safe`: also while a run is active."""
        found = removals if safe or not active_runs else kept
        found.append(Removal(what, path, sizes.of(path), reason))

    needed = _with_inputs(artifacts, referenced)
    building = {path.name for path in live}
    held = [stage.path for stage in (*artifacts, *work_dirs) if stage.name in building]
    for artifact in artifacts:
        if artifact.name not in building and not is_in(needed, artifact):
            add("artifact", artifact.path, "no run refers to it", safe=False)
    for work_dir in work_dirs:
        if work_dir.name in building:
            continue
        if not is_in(referenced, work_dir):
            add("work directory", work_dir.path, "no run refers to it", safe=True)
        elif read_artifact(store.artifacts / work_dir.name) is not None:
            add("work directory", work_dir.path, "its artifact is complete", safe=True)
        elif unfinished:
            add("work directory", work_dir.path, "its stage was interrupted", safe=False)
    for path in _temporaries(store):
        add("temporary", path, "no process uses it", safe=False)
    for path in leases.stage_leases():
        if path not in live:
            removals.append(Removal("lease", path, 0, "its owner is dead"))
    return GcResult(store.root, dry_run, tuple(removals), tuple(kept), active_runs, tuple(held))


def _with_inputs(artifacts: Sequence[StageFolder], referenced: set[str]) -> set[str]:
    """Return `referenced` and the fingerprints in the manifests of these artifacts, of the artifacts with those
    fingerprints, and so on: those that they were built from."""
    by_name: dict[str, list[StageFolder]] = {}
    for artifact in artifacts:
        for name in (artifact.fingerprint, *trials_of(artifact)):
            by_name.setdefault(name, []).append(artifact)
    needed = set(referenced)
    pending = list(referenced & by_name.keys())
    seen: set[StageFolder] = set()
    while pending:
        for artifact in by_name.get(pending.pop(), ()):
            if artifact not in seen:
                seen.add(artifact)
                found = names_in(f"{artifact.location}/{MANIFEST}") - needed
                needed |= found
                pending += found
    return needed


def _temporaries(store: Store) -> list[Path]:
    """Return what killed processes have left (incomplete parts of the caches and of leases, and what an earlier gc has
    not deleted), and the lock files of released leases."""
    patterns = ("scores/*/.*", "tokenized/.*", "tokenized/*.staging-*", "leases/.*", f"*/{DELETED}*")
    found = [path for pattern in patterns for path in store.root.glob(pattern)]
    locks = [path for path in store.leases.glob("*.lock") if not path.with_suffix("").exists()]
    in_use = (".merging", f"{GC_LEASE}.lock")
    return sorted(
        path for path in (*found, *locks) if path.name not in in_use and not path.name.startswith(f".{GC_LEASE}.")
    )


class _FreedBytes:
    """Bytes that are freed if folders are deleted one after the other. A file is freed with its last hard link."""

    def __init__(self) -> None:
        self._deleted_links: dict[tuple[int, int], int] = {}

    def of(self, path: Path) -> int:
        return sum(self._freed(entry) for entry in _stats(path))

    def _freed(self, stat: os.stat_result) -> int:
        if stat.st_nlink == 1:
            return stat.st_size
        inode = (stat.st_dev, stat.st_ino)
        self._deleted_links[inode] = self._deleted_links.get(inode, 0) + 1
        return stat.st_size if self._deleted_links[inode] == stat.st_nlink else 0


def _stats(path: Path) -> Iterator[os.stat_result]:
    """Yield the stat results of a file, or of all files in a folder; none if they no longer exist."""
    if not path.is_dir():
        with suppress(FileNotFoundError):
            yield path.lstat()
        return
    folders = [str(path)]
    while folders:
        with suppress(FileNotFoundError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                else:
                    with suppress(FileNotFoundError):
                        yield entry.stat(follow_symlinks=False)


def _remove(garbage: GcResult, leases: _Leases) -> tuple[list[Removal], list[Path], list[Path]]:
    """Remove leases and temporaries, and rename artifacts and work directories. Return what was removed, what was not
    because a process holds its lease, and the folders to delete."""
    removed: list[Removal] = []
    held: list[Path] = []
    folders: dict[Path, Path] = {}
    token = uuid.uuid4().hex[:16]
    for removal in garbage.removals:
        path = removal.path
        try:
            match removal.what:
                case "lease":
                    with leases.lease(path):
                        pass  # leaving the context removes it
                case "temporary":
                    # Absent: the lock file of a lease that was removed above.
                    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
                case _:
                    if path.parent not in folders:
                        folders[path.parent] = path.parent / f"{DELETED}{token}"
                        folders[path.parent].mkdir()
                    with leases.of_stage(path.name):
                        path.rename(folders[path.parent] / path.name)
        except LeaseHeld:
            held.append(path)
            continue
        except FileNotFoundError:  # its owner has removed it
            continue
        removed.append(removal)
        if not garbage.active_runs and removal.what != "temporary":
            # A process that acquires a lease needs its lock file, but without an active run there is none.
            (leases.folder / f"{path.name}.lock").unlink(missing_ok=True)
    return removed, held, list(folders.values())
