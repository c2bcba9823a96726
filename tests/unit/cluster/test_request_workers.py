"""cluster/request_workers.py: what is requested from the autoscaler, and when the cluster has it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[3] / "cluster" / "request_workers.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("request_workers", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_gpu_is_a_bundle_that_any_node_with_a_gpu_can_have(script: ModuleType) -> None:
    assert script.bundles(2, 0) == [{"GPU": 1, "CPU": 1}, {"GPU": 1, "CPU": 1}]
    assert script.bundles(0, 3) == [{"CPU": 1}] * 3


def test_request_is_withdrawn_with_zero(script: ModuleType) -> None:
    assert script.bundles(0, 0) == []


def test_resources_of_nodes_that_have_not_joined_are_named(script: ModuleType) -> None:
    assert script.missing(8, 0, {"CPU": 64.0, "GPU": 4.0}) == "4 of 8 GPUs"
    assert script.missing(8, 0, {}) == "0 of 8 GPUs"
    assert script.missing(8, 0, {"CPU": 64.0, "GPU": 8.0}) == ""
    assert script.missing(0, 2, {"CPU": 1.0}) == "1 of 2 CPUs"
