"""Contents of artifact folders, and pids of training workers."""

from __future__ import annotations

import subprocess
from pathlib import Path

from workspace import Workspace


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files except runtime statistics, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "measured.json"
    }


def checkpoints(bench: Workspace) -> list[Path]:
    return list(bench.store.glob("work/sft-*/checkpoints/checkpoint-*/whole"))


def worker_pids() -> list[int]:
    """Return the pids of training workers, found by the process title that Ray sets during training."""
    found = subprocess.run(["pgrep", "-f", "ray::RayTrainWorker"], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]
