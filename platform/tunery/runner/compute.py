"""What `auto` in `compute` becomes on the hardware at hand."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from tunery.errors import RequestError
from tunery.spec import Compute


@dataclass(frozen=True)
class Hardware:
    cpus: int
    gpus: int
    where: str


def local_hardware() -> Hardware:
    """This machine, without asking Ray or torch."""
    gpus = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([part for part in visible.split(",") if part.strip()]))
    return Hardware(len(os.sched_getaffinity(0)), gpus, "this machine")


def resolve_compute(compute: Compute, hardware: Hardware) -> tuple[Compute, dict[str, str]]:
    """Compute with no `auto` in workers and device, and the rule behind each.

    Raises RequestError when the workers can never be placed there.
    """
    rules: dict[str, str] = {}
    values: dict[str, object] = {}
    device = compute.device
    if device == "auto":
        device = "gpu" if hardware.gpus else "cpu"
        rules["device"] = f"{hardware.where} has {hardware.gpus} GPUs"
    values["device"] = device
    room = hardware.gpus if device == "gpu" else hardware.cpus // compute.cpus_per_worker
    workers = compute.workers
    if workers == "auto":
        workers = max(1, room if device == "gpu" else min(2, room))
        rules["workers"] = "one a GPU" if device == "gpu" else f"at most 2 on {hardware.cpus} CPUs"
    per_trial = compute.workers_per_trial
    if per_trial == "auto":
        per_trial = 1
        rules["workers_per_trial"] = "trials run side by side, one worker each"
    values |= {"workers": workers, "workers_per_trial": per_trial}
    if (needed := max(workers, per_trial)) > room:
        unit = "GPU" if device == "gpu" else f"{compute.cpus_per_worker} CPU"
        has = f"{hardware.gpus} GPUs" if device == "gpu" else f"{hardware.cpus} CPUs"
        raise RequestError(
            f"compute needs {needed} workers x {unit}; {hardware.where} has {has}",
            remedy=f"set `compute: {{workers: {max(room, 1)}}}`, or connect to a larger cluster (RAY_ADDRESS)"
            if room
            else "set `compute: {device: cpu}`, or connect to a cluster with GPUs (RAY_ADDRESS)",
        )
    return compute.model_copy(update=values), rules


def concurrent_trials(compute: Compute, hardware: Hardware) -> tuple[int, str]:
    """How many trials fit at once, and why. A trial's driver takes no CPU of its own, so trials can't lock each
    other out while all wait for workers."""
    workers = compute.workers_per_trial
    assert workers != "auto", "resolve_compute was called"
    if compute.device == "gpu":
        return max(1, hardware.gpus // workers), f"{hardware.gpus} GPUs / {workers} a trial"
    cpus = workers * compute.cpus_per_worker
    return max(1, hardware.cpus // cpus), f"{hardware.cpus} CPUs / {cpus} a trial"
