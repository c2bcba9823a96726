"""Complete checkpoints of a training, and seeding a training from another's checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

HISTORY = "history.jsonl"
COMPLETE = "whole"
"""Name of the file that marks a checkpoint as complete. It is written last and contains the checkpoint's signature."""


def checkpoint_signature(workers: int, zero_stage: int, dtype: str) -> str:
    """Return the signature of a DeepSpeed checkpoint: the settings that must match to load it."""
    return f"{workers} workers, ZeRO-{zero_stage}, {dtype}"


def mark_complete(checkpoints: Path, step: int, signature: str) -> None:
    """Mark the checkpoint of `step` as complete and remove all older ones."""
    (checkpoints / f"checkpoint-{step}" / COMPLETE).write_text(signature)
    for older in checkpoints.glob("checkpoint-*"):
        if step_of(older) < step:
            shutil.rmtree(older)


def remove_incompatible(checkpoints: Path, signature: str) -> None:
    """Remove checkpoints that are incomplete or have another signature. New ones may get the same names."""
    for path in checkpoints.glob("checkpoint-*"):
        if not (path / COMPLETE).is_file() or (path / COMPLETE).read_text() != signature:
            shutil.rmtree(path)


def last_checkpoint(checkpoints: Path, signature: str) -> Path | None:
    """Return the newest complete checkpoint with this signature, or None."""
    complete = [
        path
        for path in checkpoints.glob("checkpoint-*")
        if (path / COMPLETE).is_file() and (path / COMPLETE).read_text() == signature
    ]
    return max(complete, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint, from its name `checkpoint-<step>`."""
    return int(checkpoint.name.split("-")[1])


def write_history(checkpoint: Path, history: Sequence[Mapping[str, float]]) -> None:
    (checkpoint / HISTORY).write_text("".join(json.dumps(point) + "\n" for point in history))


def read_history(checkpoint: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (checkpoint / HISTORY).read_text().splitlines()]


def seed_from(checkpoint: Path, checkpoints: Path) -> None:
    """Copy the checkpoint of another training into `checkpoints`, unless a complete one is there. If it no longer
    exists, do nothing: the training then starts from step 0, with the same result."""
    if checkpoint.is_dir() and not any(checkpoints.glob(f"checkpoint-*/{COMPLETE}")):
        hardlink_copy(checkpoint, checkpoints)


def hardlink_copy(checkpoint: Path, folder: Path) -> None:
    """Copy a checkpoint into another folder, atomically. Files are hard-linked where the file system supports it:
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
