"""Complete checkpoints of a training, and seeding a training from another's checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

HISTORY = "history.jsonl"
COMPLETE = "whole"
"""File that is written last; it holds the checkpoint's signature."""


def checkpoint_signature(workers: int, zero_stage: int, dtype: str) -> str:
    """Return the settings that must match to load a DeepSpeed checkpoint: workers, ZeRO stage and precision."""
    return f"{workers} workers, ZeRO-{zero_stage}, {dtype}"


def mark_complete(checkpoints: Path, step: int, checkpoint_signature: str) -> None:
    """Mark a checkpoint as complete and remove all older ones."""
    (checkpoints / f"checkpoint-{step}" / COMPLETE).write_text(checkpoint_signature)
    for older in checkpoints.glob("checkpoint-*"):
        if step_of(older) < step:
            shutil.rmtree(older)


def remove_incompatible(checkpoints: Path, checkpoint_signature: str) -> None:
    """Remove incomplete checkpoints and those of other settings, which may have the names of new ones."""
    for path in checkpoints.glob("checkpoint-*"):
        if not (path / COMPLETE).is_file() or (path / COMPLETE).read_text() != checkpoint_signature:
            shutil.rmtree(path)


def last_checkpoint(checkpoints: Path, checkpoint_signature: str) -> Path | None:
    """Return the newest complete checkpoint with this signature, or None."""
    complete = [
        path
        for path in checkpoints.glob("checkpoint-*")
        if (path / COMPLETE).is_file() and (path / COMPLETE).read_text() == checkpoint_signature
    ]
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def write_history(checkpoint: Path, history: Sequence[Mapping[str, float]]) -> None:
    (checkpoint / HISTORY).write_text("".join(json.dumps(point) + "\n" for point in history))


def read_history(checkpoint: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (checkpoint / HISTORY).read_text().splitlines()]


def seed_from(checkpoint: Path, checkpoints: Path) -> None:
    """Copy another training's checkpoint into `checkpoints`, if it has no complete one. If the other checkpoint no
    longer exists, the training starts from step 0, with the same result."""
    if checkpoint.is_dir() and not any(checkpoints.glob(f"checkpoint-*/{COMPLETE}")):
        hardlink_copy(checkpoint, checkpoints)


def hardlink_copy(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint into another folder, atomically. Files are hard-linked where the file system supports it, since
    checkpoint files are never modified."""
    target, temporary = folder / checkpoint.name, folder / f".{checkpoint.name}"
    for old in (target, temporary):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(checkpoint, temporary, copy_function=_link_or_copy)
    temporary.rename(target)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
