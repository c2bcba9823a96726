"""A cluster on which an experiment can't run is refused, with the nodes, the cause and the remedy."""

from __future__ import annotations

import dataclasses
import platform
from importlib.metadata import version
from typing import Any

import pytest

from tunery.errors import RequestError
from tunery.jobs.preflight import NodeReport, check_nodes, check_placement, cluster_hardware, version_notes
from tunery.spec import Compute

NODE = NodeReport(
    "node-0",
    free_cpu=8,
    free_gpu=2,
    total_cpu=16,
    total_gpu=8,
    python=platform.python_version(),
    ray=version("ray"),
    torch="2.11.0",
    cuda="13.0",
    shares_store=True,
)


def nodes(*changed: dict[str, Any]) -> list[NodeReport]:
    return [
        dataclasses.replace(NODE, node=f"node-{number}", **fields) for number, fields in enumerate(changed or ({}, {}))
    ]


def test_suitable_nodes_pass() -> None:
    check_nodes(nodes(), "/shared/store")
    hardware = cluster_hardware(nodes(), "http://head:8265")
    assert (hardware.cpus, hardware.gpus) == (32, 16)


@pytest.mark.parametrize(
    ("fields", "message", "remedy"),
    [
        ({"error": "no answer within 60 s"}, "1 node of the cluster did not answer: node-1", "dashboard"),
        ({"shares_store": False}, "the store /shared/store is not shared by all nodes: node-1", "--store"),
        ({"missing": ("/data/rows.jsonl",)}, "/data/rows.jsonl is not visible on node-1", "shared storage"),
        ({"python": "3.9.2"}, "node-1 has Python 3.9.2, this machine has", "Python 3.9.2"),
        ({"ray": "2.60.10"}, "node-1 has Ray 2.60.10, this machine has 2.60.0", "Ray 2.60.10"),
    ],
)
def test_unsuitable_node_is_named(fields: dict[str, Any], message: str, remedy: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_nodes(nodes({}, fields), "/shared/store")
    assert refused.value.message.startswith(message)
    assert remedy in refused.value.remedy


def compute(**fields: Any) -> Compute:
    return Compute(**{"device": "gpu", "workers": 4, "workers_per_trial": 1, **fields})


def test_workers_that_fit_now_need_no_note() -> None:
    assert check_placement(nodes(), compute()) == ""


def test_workers_that_fit_later_get_a_note() -> None:
    note = check_placement(nodes(), compute(workers=5))
    assert note.startswith("5 workers with 1 CPU and a GPU each do not fit now")
    assert "free now: 2 nodes with 8 CPUs and 2 GPUs each; in total: 2 nodes with 16 CPUs and 8 GPUs each" in note


def test_workers_are_placed_by_node_not_by_the_totals_of_the_cluster() -> None:
    two_nodes = nodes({"total_cpu": 3, "free_cpu": 3}, {"total_cpu": 3, "free_cpu": 3})
    check_placement(two_nodes, compute(device="cpu", workers=2, cpus_per_worker=3))
    with pytest.raises(RequestError, match="no place for 3 workers with 2 CPUs each") as refused:
        check_placement(two_nodes, compute(device="cpu", workers=3, cpus_per_worker=2))
    assert "in total: 2 nodes with 3 CPUs each" in refused.value.cause


def test_gpus_without_cpus_are_not_used() -> None:
    with pytest.raises(RequestError, match="no place for 4 workers"):
        check_placement(nodes({"total_cpu": 1}, {"total_cpu": 2}), compute())


def test_different_versions_of_torch_are_noted() -> None:
    assert version_notes(nodes()) == []
    assert version_notes(nodes({}, {"torch": "2.13.0"})) == [
        "the nodes have different versions of torch: 2.11.0, 2.13.0"
    ]
