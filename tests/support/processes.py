"""Contents of artifact folders, and the processes of a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

from workspace import Workspace


def contents(folder: Path) -> dict[str, bytes]:
    """Return all files except runtime statistics, by relative path."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "runtime_stats.json"
    }


def checkpoints(bench: Workspace) -> list[Path]:
    return list(bench.store.glob("work/sft-*/checkpoints/checkpoint-*/whole"))


def raylet_pid(bench: Workspace) -> int | None:
    """Return the pid of the raylet that the run of the workspace has started, None if it has ended."""
    session = (bench.run / "logs" / "ray").resolve().parent.name
    found = subprocess.run(["pgrep", "-f", f"raylet/raylet .*{session}"], capture_output=True, text=True, check=False)
    return int(found.stdout.split()[0]) if found.stdout else None


def worker_pids(bench: Workspace) -> list[int]:
    """Return the pids of the workers of the run, found by the process title that Ray sets."""
    raylet = raylet_pid(bench)
    found = subprocess.run(
        ["pgrep", "-P", str(raylet or 1), "-f", "ray::RayTrainWorker"], capture_output=True, text=True, check=False
    )
    return [int(line) for line in found.stdout.split()]
