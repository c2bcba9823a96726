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

    @staticmethod
    def from_json(report: dict[str, Any]) -> NodeReport:
        return NodeReport(**report)


def cluster_hardware(nodes: Sequence[NodeReport], address: str) -> Hardware:
    """Return the total resources of the cluster."""
    return Hardware(
        int(sum(node.total_cpu for node in nodes)),
        int(sum(node.total_gpu for node in nodes)),
        f"the cluster at {address}",
    )


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
    gpu = compute.device == "gpu"
    cpus = compute.cpus_per_worker

    def capacity(node: NodeReport, which: str) -> int:
        by_cpu = int(getattr(node, f"{which}_cpu") // cpus)
        return min(by_cpu, int(getattr(node, f"{which}_gpu"))) if gpu else by_cpu

    each = f"{cpus} CPU{'s' if cpus > 1 else ''}" + (" and a GPU" if gpu else "")
    demand = f"{needed} worker{'s' if needed > 1 else ''} with {each} each"
    amounts = {
        which: " + ".join(
            f"{getattr(node, f'{which}_cpu'):g} CPUs" + (f" and {getattr(node, f'{which}_gpu'):g} GPUs" if gpu else "")
            for node in nodes
        )
        for which in ("free", "total")
    }
    state = f"free now: {amounts['free']}; in total: {amounts['total']}"
    if sum(capacity(node, "total") for node in nodes) < needed:
        raise RequestError(
            f"the cluster has no place for {demand}",
            cause=f"a worker runs on one node; {state}",
            remedy="lower `compute.workers` or `compute.cpus_per_worker`, or add nodes",
        )
    if sum(capacity(node, "free") for node in nodes) < needed:
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
