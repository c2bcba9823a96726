"""Which checkpoints of a training count, and how another training begins with one."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

HISTORY = "history.jsonl"
COMPLETE = "whole"
"""Written last: by what the checkpoint was written."""


def checkpoint_signature(workers: int, zero_stage: int, dtype: str) -> str:
    """What a DeepSpeed checkpoint can be loaded by: the same number of workers, ZeRO stage and precision."""
    return f"{workers} workers, ZeRO-{zero_stage}, {dtype}"


def mark_complete(checkpoints: Path, step: int, checkpoint_signature: str) -> None:
    (checkpoints / f"checkpoint-{step}" / COMPLETE).write_text(checkpoint_signature)
    for older in checkpoints.glob("checkpoint-*"):
        if step_of(older) < step:
            shutil.rmtree(older)


def remove_incompatible(checkpoints: Path, checkpoint_signature: str) -> None:
    """Checkpoints of other settings, and half-written ones: ours may have to be written under their names."""
    for path in checkpoints.glob("checkpoint-*"):
        if not (path / COMPLETE).is_file() or (path / COMPLETE).read_text() != checkpoint_signature:
            shutil.rmtree(path)


def last_checkpoint(checkpoints: Path, checkpoint_signature: str) -> Path | None:
    """The newest whole checkpoint that was written by workers like ours; half-written ones are left alone."""
    whole = [
        path
        for path in checkpoints.glob("checkpoint-*")
        if (path / COMPLETE).is_file() and (path / COMPLETE).read_text() == checkpoint_signature
    ]
    return max(whole, key=step_of, default=None)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


def write_history(checkpoint: Path, history: Sequence[Mapping[str, float]]) -> None:
    (checkpoint / HISTORY).write_text("".join(json.dumps(point) + "\n" for point in history))


def read_history(checkpoint: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (checkpoint / HISTORY).read_text().splitlines()]


def seed_from(checkpoint: Path, checkpoints: Path) -> None:
    """Another training's checkpoint for one's own, where there is none yet. Without it (it may be gone) the training
    begins at its beginning, and comes to the same."""
    if checkpoint.is_dir() and not any(checkpoints.glob(f"checkpoint-*/{COMPLETE}")):
        hardlink_copy(checkpoint, checkpoints)


def hardlink_copy(checkpoint: Path, folder: Path) -> None:
    """A copy in another folder, whole or not there. It takes no room: the files of a checkpoint are written once, and a
    second name for each is enough where the file system has such."""
    target, aside = folder / checkpoint.name, folder / f".{checkpoint.name}"
    for old in (target, aside):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(checkpoint, aside, copy_function=_second_name)
    aside.rename(target)


def _second_name(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
