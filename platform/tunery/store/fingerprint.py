"""Fingerprint (cache key) of a stage: a hash of everything that its result depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

HEX_DIGITS = 16
"""64 bits: in a store of a million artifacts the probability of a collision is 3e-8."""


def fingerprint(kind: str, identity: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Return the hash of the kind, the fields that change the result, and the fingerprints of the inputs by field
    path."""
    canonical = json.dumps(
        {"kind": kind, "identity": identity, "inputs": inputs}, sort_keys=True, separators=(",", ":"), allow_nan=True
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:HEX_DIGITS]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file. It takes about one second per GB, so the result is cached in the process until the
    file's size, modification time or inode changes."""
    stat = path.stat()
    return _file_digest(path.absolute(), (stat.st_size, stat.st_mtime_ns, stat.st_ino))


@lru_cache(maxsize=4096)
def _file_digest(path: Path, version: tuple[int, int, int]) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 over the names and contents of all files below `folder`."""
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{file_digest(path)}\n".encode())
    return digest.hexdigest()
