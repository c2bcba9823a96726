"""CPUs and GPUs of the nodes of the Ray cluster. A worker runs on one node, so totals of the cluster do not say whether
it fits."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

CONNECT_SECONDS = 5.0
"""Time limit for a connection to a node."""


@dataclass(frozen=True)
class NodeResources:
    """CPUs and GPUs of one node: those that are free, or all."""

    cpus: float
    gpus: float = 0

    def num_workers(self, device: str, cpus_per_worker: int) -> int:
        """Return how many workers fit on the node. `device`: "gpu" for workers with one GPU each, or "cpu"."""
        by_cpu = int(self.cpus // cpus_per_worker)
        return min(by_cpu, int(self.gpus)) if device == "gpu" else by_cpu


def num_workers(nodes: Sequence[NodeResources], device: str, cpus_per_worker: int) -> int:
    """Return how many workers fit on the nodes."""
    return sum(node.num_workers(device, cpus_per_worker) for node in nodes)


def describe_workers(count: int, device: str, cpus_per_worker: int) -> str:
    """Describe what workers need: `4 workers with 1 CPU and a GPU each`, `1 worker with 2 CPUs`."""
    each = _count(cpus_per_worker, "CPU") + (" and a GPU" if device == "gpu" else "")
    return f"{count} workers with {each} each" if count > 1 else f"1 worker with {each}"


def describe_nodes(nodes: Iterable[NodeResources], device: str) -> str:
    """Describe CPUs, and if `device` is "gpu" GPUs: `2 nodes with 16 CPUs and 8 GPUs each + 1 node with 16 CPUs`."""

    def amount(node: NodeResources) -> str:
        gpus = f" and {_count(node.gpus, 'GPU')}" if device == "gpu" else ""
        return f"{_count(node.cpus, 'CPU')}{gpus}"

    counts = Counter(map(amount, nodes))
    if counts.total() == 1:
        return next(iter(counts))
    return " + ".join(
        f"{count} nodes with {text} each" if count > 1 else f"1 node with {text}" for text, count in counts.items()
    )


def _count(amount: float, unit: str) -> str:
    return f"{amount:g} {unit}{'' if amount == 1 else 's'}"


def total_resources() -> list[NodeResources]:
    """Return the resources of each node of the cluster that is alive."""
    import ray

    return [_node(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def free_resources() -> list[NodeResources]:
    """Return the free resources of each node."""
    from ray._private.state import available_resources_per_node  # ray.available_resources() returns only the sum

    return [_node(resources) for resources in available_resources_per_node().values()]


def dead_nodes(node_ids: Collection[str]) -> set[str]:
    """Return which of these nodes are dead. Ray (2.60) notices that after 15 s or more of missed health checks, so this
    also tries to connect to the raylets of the nodes."""
    import ray

    known = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
    return {id for id in node_ids if id not in known or not _accepts_connections(known[id])}


def on_this_node() -> Any:
    """Return the scheduling strategy for an actor that the process needs: it dies only with the node of the process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def _accepts_connections(node: dict[str, Any]) -> bool:
    try:
        socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), CONNECT_SECONDS).close()
    except OSError:
        return False
    return True


def _node(resources: dict[str, float]) -> NodeResources:
    return NodeResources(resources.get("CPU", 0), resources.get("GPU", 0))
