"""Nodes of a cluster die while a run works: it continues on the others. benchmarks/faults.py tries more faults."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from local_cluster import LocalCluster, signal_node
from processes import checkpoints, contents
from workspace import Workspace, facts, wait_for


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[LocalCluster]:
    """Three nodes with one CPU each, for runs that need two."""
    cluster = LocalCluster(tmp_path / "cluster", 3, 1)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def test_training_whose_node_died_resumes_on_another_node(
    complete_run: Workspace, before_sft: Workspace, cluster: LocalCluster
) -> None:
    """With `max_failures: 0`: the death of a node is no failure of the training."""
    run = before_sft.start(**cluster.driver_environment)
    wait_for(lambda: checkpoints(before_sft), process=run)
    signal_node(cluster.node_of_a_worker("ray::RayTrainWorker"), signal.SIGKILL)
    out, err = run.communicate(timeout=240)
    assert run.returncode == 0, out + err
    assert contents(before_sft.only("sft")) == contents(complete_run.only("sft"))
    assert cluster.reserved_cpus() == 0


def test_packed_trials_whose_node_died_join_another_pack(before_sft: Workspace, cluster: LocalCluster) -> None:
    rates = [1e-4, 1e-3, 3e-3]

    def change(experiment: dict[str, Any]) -> None:
        experiment["stages"]["sft"] |= {"tuner": {"lora": {"rank": 4}}, "epochs": 3}
        experiment["stages"].pop("eval")
        experiment["compute"] |= {"max_packed_trials": 2, "save_steps": 5}
        experiment["search"] = {
            "metric": "sft.eval_loss",
            "mode": "min",
            "algorithm": "grid",
            "trials": len(rates),
            "space": {"sft.learning_rate": {"choice": rates}},
        }

    before_sft.write(change)
    run = before_sft.start(**cluster.driver_environment)
    wait_for(lambda: len(checkpoints(before_sft)) > 1, process=run)
    signal_node(cluster.node_of_a_worker("ray::PackActor"), signal.SIGKILL)
    out, err = run.communicate(timeout=300)
    assert run.returncode == 0, out + err
    (search,) = before_sft.artifacts("search")
    assert [trial["state"] for trial in facts(search)["trials"]] == ["done"] * len(rates)
    assert cluster.reserved_cpus() == 0
