"""What `auto` in `compute` becomes on the hardware at hand."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunery.errors import RequestError
from tunery.spec import Compute, Experiment, Ppo, Training


@dataclass(frozen=True)
class Hardware:
    cpus: int
    gpus: int
    where: str


def local_hardware() -> Hardware:
    """This machine, without asking Ray or torch."""
    gpus = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    visible = visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Hardware(len(os.sched_getaffinity(0)), visible, "this machine")


def visible_gpus(present: int, cuda_visible_devices: str | None) -> int:
    """How many of the GPUs CUDA shows: the ones listed, up to the first -1."""
    if cuda_visible_devices is None:
        return present
    listed = [part.strip() for part in cuda_visible_devices.split(",")]
    return min(present, len([*itertools.takewhile(lambda part: part not in ("", "-1"), listed)]))


def batch_sizes(experiment: Experiment) -> list[int]:
    """What workers have to share out evenly: the global batch sizes that an experiment names, outside its search; of
    PPO's a minibatch."""
    return [
        stage.global_batch_size // (stage.minibatches if isinstance(stage, Ppo) else 1)
        for stage in experiment.stages.values()
        if isinstance(stage, Training) and stage.global_batch_size != "auto"
    ]


def resolve_compute(
    compute: Compute, hardware: Hardware, batches: Sequence[int] = ()
) -> tuple[Compute, dict[str, str]]:
    """Compute with no `auto` in workers and device, and the rule behind each; `batches` must be shared out evenly.

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
    if compute.workers != "auto":
        workers = compute.workers
    else:
        most = max(1, room if device == "gpu" else min(2, room))
        workers = next(count for count in range(most, 0, -1) if all(size % count == 0 for size in batches))
        rules["workers"] = "one a GPU" if device == "gpu" else f"at most 2 on {hardware.cpus} CPUs"
        rules["workers"] += "" if workers == most else ", as many as share out every global batch size"
    per_trial = compute.workers_per_trial
    if not isinstance(per_trial, int):
        per_trial = 1
        rules["workers_per_trial"] = "trials run side by side, one worker each"
    values |= {"workers": workers, "workers_per_trial": per_trial}
    if (needed := max(workers, per_trial)) > room:
        unit = "GPU" if device == "gpu" else f"{compute.cpus_per_worker} CPU"
        has = f"{hardware.gpus} GPUs" if device == "gpu" else f"{hardware.cpus} CPUs"
        field = "workers" if needed == workers else "workers_per_trial"
        if room:
            remedy = f"set `compute: {{{field}: {room}}}`, or connect to a larger cluster (RAY_ADDRESS)"
        elif device == "gpu":
            remedy = "set `compute: {device: cpu}`, or connect to a cluster with GPUs (RAY_ADDRESS)"
        else:
            remedy = f"set `compute: {{cpus_per_worker: {hardware.cpus}}}` or less, or connect to a larger cluster"
        raise RequestError(f"compute needs {needed} workers x {unit}; {hardware.where} has {has}", remedy=remedy)
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
