"""Artifacts: immutable directories, named by the kind and the fingerprint of their stage.

    <store>/artifacts/<kind>-<fingerprint>/    manifest.json, runtime_stats.json, checksums.json and the output of the
                                               stage
    <store>/work/<kind>-<fingerprint>/         staging directory of a running stage: out-<owner>/ (renamed at the
                                               end), checkpoints/
    <store>/leases/<kind>-<fingerprint>        owner of the running stage
    <store>/runs/<run>/                        event log, report, logs and W&B files of a run; `lease` while it runs

`manifest.json` is deterministic (fingerprint, config, inputs and facts); `runtime_stats.json` has times and speeds;
`checksums.json` is for `tunery store verify` (checksums.py). They are written last, then the directory is renamed into
place, so an artifact is complete or absent. One whose manifest is unreadable counts as absent and is rebuilt.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.errors import RequestError, StoreError
from tunery.store.atomic_write import read_json, sync_folders, sync_path, write_json
from tunery.store.checksums import MANIFEST, RUNTIME_STATS, write_checksums
from tunery.store.lease import Lease, LeaseLost

DEFAULT_STORE = Path(".tunery")
"""Default store, relative to the working directory."""
OWNER_ONLY = 0o700
"""Mode of a store that tunery creates: artifacts have the rows of datasets, and checkpoints are pickles, which run code
when they are loaded."""
GC_LEASE = "gc"
"""Name of the lease of `tunery store gc`. Leases of artifacts contain a hyphen."""


@dataclass(frozen=True)
class Artifact:
    path: Path
    manifest: dict[str, Any]
    runtime_stats: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def facts(self) -> dict[str, Any]:
        """Statistics of the result, such as counts, scores and losses (see each stage), with the runtime statistics."""
        return {**self.manifest["facts"], **self.runtime_stats}


class Store:
    """Content-addressed store of artifacts, leases, score caches and runs."""

    def __init__(self, root: Path) -> None:
        # Path removes a slash of s3://bucket.
        self.given = re.sub(r"^(\w[\w+.-]*):/(?=[^/])", r"\1://", str(root))
        self.root = root.absolute()

    def check_writable(self) -> None:
        """Raise StoreError if `root` is not writable. Creates nothing: checks the nearest existing directory."""
        if "://" in str(self.given):
            raise StoreError(
                f"the store can't be {self.given}",
                cause="leases and renames need a file system, which an object store is not",
                remedy="give a folder with --store, on a cluster one on shared storage such as NFS or Lustre; only "
                "datasets are read from s3:// and gs://",
            )
        folder = self.root
        while not os.path.exists(folder):  # unlike Path.exists, False without permission
            folder = folder.parent
        if not folder.is_dir():
            raise StoreError(
                f"the store {self.root} can't be a folder",
                cause=f"{folder} is a file",
                remedy="give another path with --store",
            )
        if not os.access(folder, os.W_OK | os.X_OK) or _is_read_only(folder):
            raise StoreError(
                f"the store {self.root} can't be written",
                cause=f"no permission to write in {folder}",
                remedy="give another path with --store, or change the permissions",
            )

    def create(self) -> None:
        """Create the folder of the store for its owner only. The permissions of an existing one are not changed."""
        self.root.mkdir(mode=OWNER_ONLY, parents=True, exist_ok=True)

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        return read_artifact(self.artifacts / f"{kind}-{fingerprint}")

    def staging_dir(self, kind: str, fingerprint: str) -> Path:
        """Directory that the artifact is built in (`new_output_dir`). It may have checkpoints of an earlier attempt."""
        return self.root / "work" / f"{kind}-{fingerprint}"

    def lease(self, kind: str, fingerprint: str, wait: Callable[[str], None] | None = None) -> Lease:
        self.create()
        return Lease(self.leases / f"{kind}-{fingerprint}", wait)

    def gc_lease(self, wait: Callable[[str], None] | None = None) -> Lease:
        """Lease that `tunery store gc` holds while it removes artifacts, and a run for a moment when it starts
        (store_commands/garbage_collection.py)."""
        self.create()
        return Lease(self.leases / GC_LEASE, wait)

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def leases(self) -> Path:
        return self.root / "leases"

    @property
    def runs(self) -> Path:
        return self.root / "runs"

    @property
    def scores(self) -> Path:
        """Directory of the score caches (store/score_cache.py)."""
        return self.root / "scores"

    def run(self, name: str) -> Path:
        return self.runs / name

    def find_run(self, run: str) -> Path:
        """Return the folder of an existing run, given by name or path. Raises RequestError if there is none."""
        for folder in (Path(run), self.run(run)):
            if (folder / "events").is_dir():
                return folder
        known = sorted(path.name for path in self.runs.iterdir()) if self.runs.is_dir() else []
        raise RequestError(
            f"there is no run `{run}` in {self.root}", remedy=f"known runs: {', '.join(known) or 'none'}"
        )

    def commit(self, folder: Path, manifest: dict[str, Any], runtime_stats: dict[str, Any], lease: Lease) -> Artifact:
        """Rename `folder` into place with its manifest and checksums. `lease`: the lease of the artifact.

        If another process has taken over the lease and committed the artifact, return that one. Raises LeaseLost if it
        has not committed yet.
        """
        final = self.artifacts / f"{manifest['kind']}-{manifest['fingerprint']}"
        final.parent.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUNTIME_STATS, runtime_stats)
        write_json(folder / MANIFEST, manifest)
        write_checksums(folder, visit=sync_path)  # syncs several files at once
        sync_folders(folder)
        try:
            with lease.fenced():
                if (existing := read_artifact(final)) is None:
                    if final.exists():  # without a readable manifest: partially deleted, or truncated
                        shutil.rmtree(final)
                    folder.rename(final)
                    sync_path(final.parent)
        except LeaseLost:
            if (existing := read_artifact(final)) is None:
                raise
        if existing is not None:
            shutil.rmtree(folder, ignore_errors=True)
            return existing
        artifact = read_artifact(final)
        assert artifact is not None, "just committed"
        return artifact


def new_output_dir(staging_dir: Path, lease: Lease) -> Path:
    """Return a new directory in `staging_dir` that only the owner of `lease` writes to, and remove those of former
    owners: one that still runs can't mix its files with ours."""
    for former in staging_dir.glob("out-*"):
        shutil.rmtree(former, ignore_errors=True)
    out = staging_dir / f"out-{lease.token}"
    out.mkdir(parents=True)
    return out


def input_of(artifact: Artifact, field: str) -> Artifact:
    """Return the input artifact at `field` of the stage that built `artifact`; it is in the same store.

    The fingerprint of an artifact covers its inputs, so reading an input through it is covered as well. Raises
    StoreError if the input was removed.
    """
    name = f"*-{artifact.manifest['inputs'][field]}"
    path = next(artifact.path.parent.glob(name), None)
    result = None if path is None else read_artifact(path)
    if result is None:
        raise StoreError(
            f"{artifact.path.parent / name} no longer exists",
            cause=f"{artifact.path.name} was built from it",
            remedy="run `tunery run` again: it rebuilds missing artifacts",
        )
    return result


def read_artifact(path: Path) -> Artifact | None:
    """Return the artifact in a folder; None if there is none. An artifact whose manifest or runtime statistics are
    truncated (by a power failure or a full disk) counts as absent."""
    manifest = read_json(path / MANIFEST)
    if manifest is None or not manifest.keys() >= {"kind", "fingerprint", "facts"}:
        return None
    runtime_stats = read_json(path / RUNTIME_STATS)
    return None if runtime_stats is None else Artifact(path, manifest, runtime_stats)


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
