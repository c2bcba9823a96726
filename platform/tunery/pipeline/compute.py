"""Resolve `auto` values of `compute` for the available hardware."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunery.errors import RequestError
from tunery.spec import Compute, Experiment, Training
from tunery.workers.cluster_resources import NodeResources, describe_nodes, describe_workers, num_workers


@dataclass(frozen=True)
class Hardware:
    nodes: Sequence[NodeResources]
    host: str
    gpu_gb: float | None = None
    """Memory of a GPU in GB, if it is known."""

    @property
    def cpus(self) -> int:
        return int(sum(node.cpus for node in self.nodes))

    @property
    def gpus(self) -> int:
        return int(sum(node.gpus for node in self.nodes))


CPUS_PER_GPU = 16
"""Assumed for hardware that is described by its GPUs only."""


def parse_hardware(text: str) -> Hardware:
    """Return the hardware of `4x8xH100-80GB` (nodes x GPUs x type and memory of a GPU), `8xH100-80GB` (one node) or
    `4x16cpu` (nodes x CPUs). Raises RequestError for other texts."""
    gpu = re.fullmatch(r"(?:(\d+)x)?(\d+)x([A-Za-z]\w*)-(\d+)GB", text)
    cpu = re.fullmatch(r"(?:(\d+)x)?(\d+)cpu", text)
    if (match := gpu or cpu) is None or "0" in (match[1], match[2]):
        raise RequestError(
            f"`{text}` does not describe hardware",
            remedy="write nodes x GPUs x type, such as 4x8xH100-80GB or 1xA100-40GB, or nodes x CPUs, such as 4x16cpu",
        )
    nodes, count = int(match[1] or 1), int(match[2])
    if gpu is None:
        return Hardware([NodeResources(count)] * nodes, text)
    return Hardware([NodeResources(count * CPUS_PER_GPU, count)] * nodes, text, float(match[4]))


def local_hardware() -> Hardware:
    """Return the hardware of this machine without importing Ray or torch."""
    gpus = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    visible = visible_gpus(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return Hardware([NodeResources(len(os.sched_getaffinity(0)), visible)], "this machine")


def visible_gpus(present: int, cuda_visible_devices: str | None) -> int:
    """Return the number of GPUs visible to CUDA: those listed in CUDA_VISIBLE_DEVICES up to the first -1."""
    if cuda_visible_devices is None:
        return present
    listed = [part.strip() for part in cuda_visible_devices.split(",")]
    return min(present, len([*itertools.takewhile(lambda part: part not in ("", "-1"), listed)]))


def batch_sizes(experiment: Experiment) -> list[int]:
    """Return the batch sizes that the number of workers must divide: the global batch sizes in the experiment, without
    its search space; for PPO the minibatch sizes."""
    return [
        stage.global_batch_size // stage.num_minibatches
        for stage in experiment.stages.values()
        if isinstance(stage, Training) and stage.global_batch_size != "auto"
    ]


def resolve_compute(
    compute: Compute, hardware: Hardware, batches: Sequence[int] = ()
) -> tuple[Compute, dict[str, str]]:
    """Return compute without `auto` in workers and device, and the rule behind each. The number of workers divides all
    `batches`.

    Raises RequestError if the workers do not fit on the nodes of the hardware.
    """
    rules: dict[str, str] = {}
    values: dict[str, object] = {}
    device = compute.device
    if device == "auto":
        device = "gpu" if hardware.gpus else "cpu"
        rules["device"] = f"{hardware.host} has {hardware.gpus} GPUs"
    values["device"] = device
    capacity = num_workers(hardware.nodes, device, compute.cpus_per_worker)
    if compute.workers != "auto":
        workers = compute.workers
    else:
        max_workers = max(1, capacity if device == "gpu" else min(2, capacity))
        workers = next(count for count in range(max_workers, 0, -1) if all(size % count == 0 for size in batches))
        rules["workers"] = "one per GPU" if device == "gpu" else f"at most 2 on {hardware.cpus} CPUs"
        rules["workers"] += (
            "" if workers == max_workers else ", the largest number that divides every global batch size"
        )
    per_trial = compute.workers_per_trial
    if not isinstance(per_trial, int):
        per_trial = 1
        rules["workers_per_trial"] = "trials run concurrently, with one worker each"
    values |= {"workers": workers, "workers_per_trial": per_trial}
    if (needed := max(workers, per_trial)) > capacity:
        demand = describe_workers(needed, device, compute.cpus_per_worker)
        has = describe_nodes(hardware.nodes, device)
        field = "workers" if needed == workers else "workers_per_trial"
        largest = int(max(node.cpus for node in hardware.nodes))
        if capacity:
            remedy = f"set `compute: {{{field}: {capacity}}}`, or connect to a larger cluster (RAY_ADDRESS)"
        elif device == "gpu" and not hardware.gpus:
            remedy = "set `compute: {device: cpu}`, or connect to a cluster with GPUs (RAY_ADDRESS)"
        else:
            remedy = f"set `compute: {{cpus_per_worker: {largest}}}` or less, or connect to a larger cluster"
        raise RequestError(f"compute needs {demand}; {hardware.host} has {has}", remedy=remedy)
    return compute.model_copy(update=values), rules


def concurrent_trials(compute: Compute, hardware: Hardware) -> tuple[int, str]:
    """Return the number of concurrent trials and the reason. The driver of a trial reserves no CPU, so trials cannot
    deadlock while all of them wait for workers."""
    workers = compute.workers_per_trial
    assert workers != "auto", "resolve_compute was called"
    count = max(1, num_workers(hardware.nodes, compute.device, compute.cpus_per_worker) // workers)
    if compute.device == "gpu":
        return count, f"{hardware.gpus} GPUs / {workers} per trial"
    return count, f"{hardware.cpus} CPUs / {workers * compute.cpus_per_worker} per trial"
