"""Artifacts: immutable folders, each named by its stage's kind and fingerprint.

    <store>/artifacts/<kind>-<fingerprint>/    manifest.json, measured.json and what the stage made
    <store>/work/<kind>-<fingerprint>/         of a stage that is being made: out/ (renamed at the end), checkpoints/
    <store>/leases/<kind>-<fingerprint>        who is making it
    <store>/runs/<run>/                        the event log, report, logs and W&B files of a run

`manifest.json` holds what is the same for everybody who makes the artifact (its fingerprint, spec, inputs and facts),
`measured.json` what is not (times, speeds). The manifest is written last, then the folder is renamed into place: an
artifact is there whole or not at all.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunery.errors import RequestError, StoreError
from tunery.store.lease import Lease

DEFAULT_STORE = Path(".tunery")
"""Where a store is when nobody says: below the folder that the command is given in."""


@dataclass(frozen=True)
class Artifact:
    path: Path
    manifest: dict[str, Any]
    measured: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        return str(self.manifest["fingerprint"])

    @property
    def kind(self) -> str:
        return str(self.manifest["kind"])

    @property
    def facts(self) -> dict[str, Any]:
        """What the stage tells about its result: counts, scores, losses (see each stage)."""
        return {**self.manifest["facts"], **self.measured}


class Store:
    """Raises StoreError when `root` can't be written."""

    def __init__(self, root: Path) -> None:
        self.root = root.absolute()

    def check_writable(self) -> None:
        """Without leaving anything behind: the nearest folder that exists must let us write."""
        folder = self.root
        while not os.path.exists(folder):  # unlike Path.exists, False where we may not look
            folder = folder.parent
        if not folder.is_dir():
            raise StoreError(
                f"the store {self.root} can't be a folder",
                cause=f"{folder} is a file",
                remedy="give another place with --store",
            )
        if not os.access(folder, os.W_OK | os.X_OK) or _is_read_only(folder):
            raise StoreError(
                f"the store {self.root} can't be written",
                cause=f"no permission to write in {folder}",
                remedy="give another place with --store, or change the permissions",
            )

    def find(self, kind: str, fingerprint: str) -> Artifact | None:
        return read_artifact(self.root / "artifacts" / f"{kind}-{fingerprint}")

    def work(self, kind: str, fingerprint: str) -> Path:
        """The folder where the artifact is being made; what stands there already belongs to an earlier try."""
        return self.root / "work" / f"{kind}-{fingerprint}"

    def lease(self, kind: str, fingerprint: str, wait: Callable[[str], None] | None = None) -> Lease:
        return Lease(self.root / "leases" / f"{kind}-{fingerprint}", wait)

    @property
    def scores(self) -> Path:
        """The folder of score tables (store/score_cache.py)."""
        return self.root / "scores"

    def run(self, name: str) -> Path:
        return self.root / "runs" / name

    def find_run(self, run: str) -> Path:
        """The folder of a run that there is, by its name or as a path. Raises RequestError."""
        for folder in (Path(run), self.run(run)):
            if (folder / "events").is_dir():
                return folder
        runs = self.root / "runs"
        known = sorted(path.name for path in runs.iterdir()) if runs.is_dir() else []
        raise RequestError(
            f"there is no run `{run}` in {self.root}", remedy=f"known runs: {', '.join(known) or 'none'}"
        )

    def commit(self, folder: Path, manifest: dict[str, Any], measured: dict[str, Any]) -> Artifact:
        """Rename `folder` into place with its manifest. The lease must be held."""
        final = self.root / "artifacts" / f"{manifest['kind']}-{manifest['fingerprint']}"
        final.parent.mkdir(parents=True, exist_ok=True)
        _write_json(folder / "measured.json", measured)
        _write_json(folder / "manifest.json", manifest)
        _sync_tree(folder)
        if (made := read_artifact(final)) is not None:  # by somebody who took our lease for dead: the same result
            shutil.rmtree(folder)
            return made
        if final.exists():  # without a manifest: a leftover that somebody half deleted
            shutil.rmtree(final)
        folder.rename(final)
        _sync(final.parent)
        artifact = read_artifact(final)
        assert artifact is not None, "just committed"
        return artifact


def input_of(artifact: Artifact, field: str) -> Artifact:
    """What `artifact` was made from at `field` of its stage: it lies in the same store.

    An artifact's fingerprint covers those of its inputs, so who reads through it reads nothing that its own
    fingerprint leaves out. Raises StoreError when somebody removed it.
    """
    name = f"*-{artifact.manifest['inputs'][field]}"
    path = next(artifact.path.parent.glob(name), None)
    found = None if path is None else read_artifact(path)
    if found is None:
        raise StoreError(
            f"{artifact.path.parent / name} isn't there any more",
            cause=f"{artifact.path.name} was made from it",
            remedy="give `tunery run` again: it makes what is missing",
        )
    return found


def read_artifact(path: Path) -> Artifact | None:
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        measured = json.loads((path / "measured.json").read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Artifact(path, manifest, measured)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, sort_keys=True, allow_nan=True) + "\n")


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync(path)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_read_only(folder: Path) -> bool:
    return bool(os.statvfs(folder).f_flag & os.ST_RDONLY)
