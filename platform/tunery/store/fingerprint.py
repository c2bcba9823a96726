"""What a stage's result depends on, as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

LENGTH = 16
"""Hex digits: 64 bits, so that a store of a million artifacts has a collision with a chance of 3e-8."""


def fingerprint(kind: str, identity: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Hash of the kind, the fields that change the result, and the fingerprints of the inputs by field path."""
    canonical = json.dumps(
        {"kind": kind, "identity": identity, "inputs": inputs}, sort_keys=True, separators=(",", ":"), allow_nan=True
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:LENGTH]


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """sha256 over the names and bytes of all files below `folder`.

    About a second a gigabyte, so a process reads a folder once, until a file's size or time changes.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [path.stat() for path in files]
    return _digest(folder, tuple(zip(files, ((s.st_size, s.st_mtime_ns, s.st_ino) for s in stats), strict=True)))


@cache
def _digest(folder: Path, files: tuple[tuple[Path, tuple[int, int, int]], ...]) -> str:
    digest = hashlib.sha256()
    for path, _ in files:
        digest.update(f"{path.relative_to(folder)}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()
