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


def checkpoints(workspace: Workspace) -> list[Path]:
    return list(workspace.store.glob("work/sft-*/checkpoints/checkpoint-*/whole"))


def raylet_pid(workspace: Workspace) -> int | None:
    """Return the pid of the raylet that the run of the workspace has started, None if it has ended or not started."""
    link = workspace.run / "logs" / "ray"
    if not link.is_symlink():
        return None
    session = link.resolve().parent.name
    result = subprocess.run(["pgrep", "-f", f"raylet/raylet .*{session}"], capture_output=True, text=True, check=False)
    return int(result.stdout.split()[0]) if result.stdout else None


def worker_pids(workspace: Workspace) -> list[int]:
    """Return the pids of the workers of the run, by the process title that Ray sets."""
    raylet = raylet_pid(workspace)
    result = subprocess.run(
        ["pgrep", "-P", str(raylet or 1), "-f", "ray::RayTrainWorker"], capture_output=True, text=True, check=False
    )
    return [int(line) for line in result.stdout.split()]
