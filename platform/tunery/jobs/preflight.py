"""Decide from the reports of a cluster's nodes (probe.py) whether an experiment can run there."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from tunery.errors import RequestError
from tunery.pipeline.compute import Hardware
from tunery.spec import Compute
from tunery.workers.cluster_resources import NodeResources, describe_nodes, describe_workers, num_workers


@dataclass(frozen=True)
class NodeReport:
    """What the probe found out about a node."""

    node: str
    """Host name."""
    free_cpu: float
    free_gpu: float
    total_cpu: float
    total_gpu: float
    python: str = ""
    ray: str = ""
    torch: str = ""
    cuda: str = ""
    missing: Sequence[str] = ()
    """Paths that the experiment reads and the node does not have."""
    shares_store: bool = False
    """Whether the driver sees what the node writes to the store."""
    error: str = ""
    """Why the node did not report; "" if it did."""

    @property
    def free(self) -> NodeResources:
        return NodeResources(self.free_cpu, self.free_gpu)

    @property
    def total(self) -> NodeResources:
        return NodeResources(self.total_cpu, self.total_gpu)

    @staticmethod
    def from_json(report: dict[str, Any]) -> NodeReport:
        return NodeReport(**report)


def cluster_hardware(nodes: Sequence[NodeReport], address: str) -> Hardware:
    """Return the total resources of the cluster."""
    return Hardware([node.total for node in nodes], f"the cluster at {address}")


def check_nodes(nodes: Sequence[NodeReport], store: str) -> None:
    """Raise RequestError if a node does not answer, does not see the store or a path of the experiment, or has another
    Python or Ray than this machine."""
    if failed := [node for node in nodes if node.error]:
        raise RequestError(
            f"{_count(failed, 'node')} of the cluster did not answer: {_names(failed)}",
            cause=failed[0].error,
            remedy="see the cluster's dashboard, or remove the node",
        )
    if separate := [node for node in nodes if not node.shares_store]:
        raise RequestError(
            f"the store {store} is not shared by all nodes: {_names(separate)}",
            cause="a file that was written there by one node is not visible on another",
            remedy="give a folder on shared storage with --store; all nodes must see it under the same path",
        )
    for path in dict.fromkeys(path for node in nodes for path in node.missing):
        without = [node for node in nodes if path in node.missing]
        raise RequestError(
            f"{path} is not visible on {_names(without)}",
            cause="data and local models are not shipped to the cluster",
            remedy="put it on shared storage under the same path on all nodes, or use a source such as hub: or s3:",
        )
    here = {"python": ".".join(platform.python_version_tuple()[:2]), "ray": version("ray")}
    for name, own in here.items():
        others = [node for node in nodes if not f"{getattr(node, name)}.".startswith(f"{own}.")]
        if others:
            raise RequestError(
                f"{_names(others)} has {name.capitalize()} {getattr(others[0], name)}, this machine has {own}",
                cause="the code and objects of this machine are not valid there",
                remedy=f"submit from an environment with {name.capitalize()} {getattr(others[0], name)}",
            )


def check_placement(nodes: Sequence[NodeReport], compute: Compute) -> str:
    """Raise RequestError if the workers of `compute` (resolved) do not fit on the nodes even when all are free. Each
    worker needs its CPUs, and its GPU, on one node. Return a note if they do not fit now, else ""."""
    assert compute.workers != "auto", "resolved"
    assert compute.workers_per_trial != "auto", "resolved"
    needed = max(compute.workers, compute.workers_per_trial)
    device, cpus = compute.device, compute.cpus_per_worker
    free, total = [node.free for node in nodes], [node.total for node in nodes]
    demand = describe_workers(needed, device, cpus)
    state = f"free now: {describe_nodes(free, device)}; in total: {describe_nodes(total, device)}"
    if num_workers(total, device, cpus) < needed:
        raise RequestError(
            f"the cluster has no place for {demand}",
            cause=f"a worker runs on one node; {state}",
            remedy="lower `compute.workers` or `compute.cpus_per_worker`, or add nodes",
        )
    if num_workers(free, device, cpus) < needed:
        return f"{demand} do not fit now and will wait for resources ({state})"
    return ""


def version_notes(nodes: Sequence[NodeReport]) -> list[str]:
    """Return notes about versions that may change results: nodes that differ from each other."""
    notes = []
    for name in ("torch", "cuda"):
        found = sorted({getattr(node, name) for node in nodes})
        if len(found) > 1:
            notes.append(f"the nodes have different versions of {name}: {', '.join(found)}")
    return notes


def _names(nodes: Sequence[NodeReport]) -> str:
    names = list(dict.fromkeys(node.node for node in nodes))
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _count(nodes: Sequence[NodeReport], word: str) -> str:
    return f"{len(nodes)} {word}{'s' if len(nodes) > 1 else ''}"
