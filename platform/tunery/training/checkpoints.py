"""Complete checkpoints of a training, and seeding a training from another's checkpoint.

A checkpoint is synced to the disk before it is marked as complete, so no mark survives a power failure without its
checkpoint. If a mark or a JSON file is truncated nevertheless, the checkpoint counts as incomplete: the training
resumes from an earlier one, or starts again.

DeepSpeed's files are pickles, and loading a pickle may run code. A checkpoint is therefore loaded only if this user
wrote all of it and no other user can have changed it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunery.errors import TuneryError
from tunery.store.atomic_write import publish_folder, remove_temporaries, sync_tree, temporary_name, write_text

HISTORY = "history.jsonl"
COMPLETE = "whole"
"""Name of the file that marks a checkpoint as complete. It is written last and contains the checkpoint's signature."""


WRITABLE_BY_OTHERS = 0o022
"""Permission bits."""


def checkpoint_signature(workers: int, zero_stage: int, dtype: str) -> str:
    """Return the signature of a DeepSpeed checkpoint: the settings that must match to load it."""
    return f"{workers} workers, ZeRO-{zero_stage}, {dtype}"


def mark_complete(checkpoints: Path, step: int, signature: str) -> None:
    """Mark the checkpoint of `step` as complete and remove all older ones. Other users cannot write to it."""
    checkpoint = checkpoints / f"checkpoint-{step}"
    for path in (checkpoint, *checkpoint.rglob("*")):
        path.chmod(path.stat().st_mode & ~WRITABLE_BY_OTHERS)
    sync_tree(checkpoint)
    write_text(checkpoint / COMPLETE, signature)
    for older in checkpoints.glob("checkpoint-*"):
        if step_of(older) < step:
            shutil.rmtree(older)


def remove_incompatible(checkpoints: Path, signature: str) -> None:
    """Remove checkpoints that are incomplete or have another signature. New ones may get the same names."""
    for path in checkpoints.glob("checkpoint-*"):
        if not _is_complete(path, signature):
            shutil.rmtree(path)


def last_checkpoint(checkpoints: Path, signature: str) -> Path | None:
    """Return the newest complete checkpoint with this signature, or None. Raises TuneryError if another user may have
    written it."""
    complete = [path for path in checkpoints.glob("checkpoint-*") if _is_complete(path, signature)]
    last = max(complete, key=step_of, default=None)
    if last is not None:
        _check_is_own(last)
    return last


def _check_is_own(checkpoint: Path) -> None:
    probe = temporary_name(checkpoint)
    probe.touch()
    own = probe.stat().st_uid  # not the process's user: NFS may map root to another one
    probe.unlink(missing_ok=True)
    for path in (checkpoint, *checkpoint.rglob("*")):
        status = path.lstat()
        if status.st_uid != own or (status.st_mode & WRITABLE_BY_OTHERS and not path.is_symlink()):
            raise TuneryError(
                f"the checkpoint {checkpoint} is not loaded: another user may have written {path.name}",
                cause=f"it belongs to user {status.st_uid}, this process is user {own}"
                if status.st_uid != own
                else f"other users can write to it (mode {status.st_mode & 0o777:o})",
                remedy=f"checkpoints can run code when they are loaded. If you trust it: `chown -R {own} {checkpoint} "
                f"&& chmod -R go-w {checkpoint}`; else delete it, and the training starts again",
            )


def _is_complete(checkpoint: Path, signature: str) -> bool:
    """Whether a checkpoint has a mark with this signature, and no truncated JSON file (such as history.jsonl, and
    ppo.json of PPO)."""
    mark = checkpoint / COMPLETE
    if not mark.is_file() or mark.read_bytes() != signature.encode():
        return False
    try:
        for path in checkpoint.glob("*.json"):
            json.loads(path.read_bytes())
        read_history(checkpoint)
    except (FileNotFoundError, ValueError):
        return False
    return True


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name `checkpoint-<step>`."""
    return int(checkpoint.name.split("-")[1])


def write_history(checkpoint: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write the history of a checkpoint, before the checkpoint is marked as complete."""
    write_text(checkpoint / HISTORY, "".join(json.dumps(point) + "\n" for point in history))


def read_history(checkpoint: Path) -> list[dict[str, float]]:
    """Return the history of a checkpoint. Raises ValueError if it is truncated."""
    lines = (checkpoint / HISTORY).read_text(encoding="utf-8").split("\n")
    if lines.pop() or not lines:
        raise ValueError(f"{checkpoint / HISTORY} is empty or ends within a line")
    return [json.loads(line) for line in lines]


def seed_from(checkpoint: Path, checkpoints: Path) -> None:
    """Copy the checkpoint of another training into `checkpoints`, unless a complete one is there. If it no longer
    exists, do nothing: the training then starts from step 0, with the same result."""
    if checkpoint.is_dir() and not any(checkpoints.glob(f"checkpoint-*/{COMPLETE}")):
        hardlink_copy(checkpoint, checkpoints)


def hardlink_copy(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint into another folder, atomically. Files are hard-linked where the file system supports it:
    checkpoint files are never modified."""
    target = folder / checkpoint.name
    shutil.rmtree(target, ignore_errors=True)
    remove_temporaries(target)
    temporary = temporary_name(target)
    shutil.copytree(checkpoint, temporary, copy_function=_link_or_copy)
    publish_folder(temporary, target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
