"""Atomic, durable writes: a file or folder is complete or absent, also after a crash, a full disk or a power failure.

Content is written under a temporary name that no other process uses, synced to the disk, and renamed. Then the folder
is synced, because the rename itself is data of the folder. Without the first sync a file system may keep the rename and
lose the content, so readers still treat an unreadable file as absent (`read_json`).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any


def temporary_name(path: Path) -> Path:
    """Return a hidden name next to `path` that no other process uses, with the same ending: some libraries choose the
    format of a file by it."""
    return path.with_name(f".{path.stem}.{uuid.uuid4().hex[:16]}{path.suffix}")


@contextmanager
def replace_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Context manager for writing a file: yields a temporary name, and renames that file to `path` at the end.

    If the body fails, `path` is unchanged and the temporary file is removed. `sync=False`: for files that need not
    survive a power failure.
    """
    temporary = temporary_name(path)
    try:
        yield temporary
        publish_file(temporary, path, sync=sync)
    finally:
        with suppress(OSError):  # renamed, or never created
            temporary.unlink()


def write_text(path: Path, text: str, *, sync: bool = True) -> None:
    """Write a UTF-8 file atomically."""
    with replace_file(path, sync=sync) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically. Keys are sorted, so equal values give equal files."""
    write_text(path, json.dumps(value, indent=1, sort_keys=True, allow_nan=True) + "\n")


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if the file is absent, truncated or otherwise not a JSON object."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def publish_file(temporary: Path, path: Path, *, sync: bool = True) -> None:
    """Rename a complete file to `path`, once its content is on the disk."""
    if sync:
        sync_path(temporary)
    temporary.replace(path)
    if sync:
        sync_path(path.parent)


def publish_folder(folder: Path, final: Path) -> None:
    """Rename a complete folder to `final`, which must be absent or empty, once its content is on the disk. Raises
    OSError if `final` exists."""
    sync_tree(folder)
    folder.rename(final)
    sync_path(final.parent)


def remove_temporaries(path: Path) -> None:
    """Remove temporary files and folders of `path` that dead writers have left. No process may be writing `path`."""
    for former in path.parent.glob(f".{path.stem}.*{path.suffix}"):
        if len(former.name) == len(temporary_name(path).name):
            shutil.rmtree(former) if former.is_dir() else former.unlink(missing_ok=True)


def sync_tree(folder: Path) -> None:
    """Sync all files and folders in `folder`, and itself, to the disk."""
    for path in folder.rglob("*"):
        sync_path(path)
    sync_path(folder)


def sync_folders(folder: Path) -> None:
    """Sync `folder` and the folders in it, without their files, which are on the disk already."""
    for path, _, _ in os.walk(folder):
        sync_path(Path(path))


def sync_path(path: Path) -> None:
    """Sync a file or the entries of a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without fsync of folders, such as SMB
            raise
    finally:
        os.close(descriptor)
