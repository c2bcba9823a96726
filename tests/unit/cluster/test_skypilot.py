"""cluster/skypilot.yaml and its volume match the schemas of SkyPilot (schemas/skypilot.json)."""

from __future__ import annotations

import copy
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from reduced_schemas import FOLDER, errors

CLUSTER = Path(__file__).parents[3] / "cluster"
TASK = yaml.safe_load((CLUSTER / "skypilot.yaml").read_text(encoding="utf-8"))
VOLUME = yaml.safe_load((CLUSTER / "skypilot-volume.yaml").read_text(encoding="utf-8"))


def test_task_and_volume_match_the_schemas() -> None:
    assert errors("skypilot", "Task", TASK) == []
    assert errors("skypilot", "Volume", VOLUME) == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("num_node",), 2),
        (("num_nodes",), "two"),
        (("resources", "accelerator"), "H100:8"),
        (("envs", "NOT A NAME"), "x"),
        (("file_mounts",), {"/data": {"source": "s3://bucket", "modus": "MOUNT"}}),
    ],
)
def test_wrong_task_is_rejected(path: tuple[str, ...], value: Any) -> None:
    task = copy.deepcopy(TASK)
    target = task
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    assert errors("skypilot", "Task", task) != []


def test_wrong_volume_is_rejected() -> None:
    assert errors("skypilot", "Volume", {**VOLUME, "sizes": "1Gi"}) != []
    assert errors("skypilot", "Volume", {**VOLUME, "config": {"access_mode": "ReadWriteAll"}}) != []


def test_store_is_on_the_volume_and_the_token_is_a_secret() -> None:
    assert TASK["volumes"] == {"/shared": VOLUME["name"]}
    assert VOLUME["config"]["access_mode"] == "ReadWriteMany"
    assert "--store /shared/store" in TASK["run"]
    assert TASK["secrets"] == {"RAY_AUTH_TOKEN": None}
    assert TASK["envs"]["RAY_AUTH_MODE"] == "token"
    assert "--dashboard-host=127.0.0.1" in TASK["run"]


@pytest.mark.parametrize("name", ["setup", "run"])
def test_scripts_are_valid_bash(name: str) -> None:
    done = subprocess.run(["bash", "-n"], input=TASK[name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_schema_records_its_origin() -> None:
    origin = json.loads((FOLDER / "skypilot.json").read_text())["$comment"]
    assert origin["license"] == "Apache-2.0"
    assert f"SkyPilot {origin['version']}" in (CLUSTER / "skypilot.yaml").read_text()
