"""cluster/aws.yaml and cluster/gcp.yaml: Ray's autoscaler accepts them, and the cluster requires a token."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[3]
each_cloud = pytest.mark.parametrize("name", ["aws", "gcp"])
TOKEN = "/home/ubuntu/.ray/auth_token"
"""Where Ray looks for a token."""


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / "cluster" / f"{name}.yaml").read_text(encoding="utf-8"))


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """Return the config as `ray up` completes and checks it before it calls the cloud."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    complete = prepare_config(config)
    validate_config(complete)
    return complete


@each_cloud
def test_ray_accepts_the_config(name: str) -> None:
    complete = prepared(read(name))
    assert complete["provider"]["type"] == name
    assert complete["available_node_types"]["gpu"]["min_workers"] == 0
    assert complete["available_node_types"]["gpu"]["max_workers"] > 0


@each_cloud
def test_misspelt_key_is_rejected(name: str) -> None:
    config = read(name)
    config["idle_timeout_minute"] = 15
    with pytest.raises(jsonschema.ValidationError, match="idle_timeout_minute"):
        prepared(config)
    config = read(name)
    config["available_node_types"]["gpu"]["max_worker"] = 2
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        prepared(config)


@each_cloud
def test_nodes_require_a_token_and_the_dashboard_listens_on_loopback(name: str) -> None:
    complete = prepared(read(name))
    starts = [
        command
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
        for command in complete[key]
        if "ray start" in command
    ]
    assert len(starts) == 2
    for command in starts:
        assert re.search(r"\bexport RAY_AUTH_MODE=token\b", command)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert TOKEN in complete["file_mounts"]
    assert complete["setup_commands"][0] == "chmod 700 ~/.ray && chmod 600 ~/.ray/auth_token"
    assert "0.0.0.0" not in (ROOT / "cluster" / f"{name}.yaml").read_text()


@each_cloud
def test_all_nodes_mount_the_store_and_install_tunery_with_the_constraints(name: str) -> None:
    complete = prepared(read(name))
    for kind in ("head_setup_commands", "worker_setup_commands"):  # prepare_config adds the common ones
        commands = "\n".join(complete[kind])
        assert re.search(r"mountpoint -q /shared \|\| sudo mount -t nfs4 .*nfsvers=4\.1", commands)
        assert "pip install -q -c ~/tunery/constraints.txt ~/tunery" in commands


@each_cloud
def test_file_mounts_exist_in_the_checkout(name: str) -> None:
    for remote, local in read(name)["file_mounts"].items():
        assert remote == TOKEN or (ROOT / local).exists()


def test_aws_workers_are_spot_instances_and_no_security_group_is_created() -> None:
    types = read("aws")["available_node_types"]
    assert types["gpu"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert all("SecurityGroupIds" in kind["node_config"] for kind in types.values())
