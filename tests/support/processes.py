"""Files of a folder, and the processes of training workers."""

from __future__ import annotations

import subprocess
from pathlib import Path

from workspace import Workspace


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the measured times."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "measured.json"
    }


def checkpoints(bench: Workspace) -> list[Path]:
    return list(bench.store.glob("work/sft-*/checkpoints/checkpoint-*/whole"))


def worker_pids() -> list[int]:
    """Training workers, by the title that Ray gives their processes while they train."""
    found = subprocess.run(["pgrep", "-f", "ray::RayTrainWorker"], capture_output=True, text=True, check=False)
    return [int(line) for line in found.stdout.split()]
