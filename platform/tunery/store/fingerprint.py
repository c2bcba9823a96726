"""What a stage's result depends on, as one hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
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
    """sha256 over names, sizes and content of all files below `folder`; of large files the first and last MiB.

    Model folders hold tens of gigabytes: reading them whole at every plan would take minutes, and weights that
    differ, differ in their first and last MiB, or in their config.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder)}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            if size > 1 << 21:
                file.seek(-(1 << 20), 2)
            digest.update(file.read(1 << 20))
    return digest.hexdigest()
