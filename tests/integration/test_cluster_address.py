"""RAY_ADDRESS: runs on an existing Ray cluster, and at an address where there is none."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from processes import raylet_pid
from workspace import ENVIRONMENT, Workspace, wait_for

EXPERIMENT = """
name: small
seed: 17
stages:
  texts:  {kind: dataset, source: "builtin:python-docs", subset: texts, split: train, limit: 60}
  scored: {kind: score, data: texts, by: [{length: words}]}
"""
CLUSTER = """
import ray
context = ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
print(context.address_info["gcs_address"], flush=True)
input()
"""


@pytest.fixture
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    bench = Workspace(tmp_path_factory.mktemp("cluster"))
    bench.file.write_text(EXPERIMENT)
    return bench


ACCESS = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


@pytest.fixture
def cluster() -> Iterator[str]:
    """Address of a Ray cluster with token authentication, started in another process."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        env={**ENVIRONMENT, **ACCESS},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        # Ray prints other lines first.
        yield next(line.strip() for line in process.stdout if line.strip().rpartition(":")[2].isdigit())
    finally:
        process.communicate("\n", timeout=60)


def test_ray_of_a_run_requires_its_token_and_its_files_are_private(bench: Workspace) -> None:
    run = bench.start(WANDB_MODE="disabled")
    wait_for(lambda: raylet_pid(bench) is not None, process=run)
    os.kill(run.pid, signal.SIGSTOP)  # so that it does not end meanwhile
    try:
        words = Path(f"/proc/{raylet_pid(bench)}/cmdline").read_text().split("\0")
        address = next(word.partition("=")[2] for word in words if word.startswith("--gcs-address="))
        connect = [sys.executable, "-c", f"from ray._raylet import GcsClient; GcsClient(address={address!r})"]
        refused = subprocess.run(connect, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
        assert refused.returncode == 1
        assert "AuthenticationError" in refused.stderr
        (private,) = [
            folder for folder in (bench.run / "logs" / "ray").resolve().parents if folder.parent == Path("/tmp")
        ]
        assert (private.stat().st_mode & 0o777, private.stat().st_uid) == (0o700, os.getuid())
    finally:
        os.kill(run.pid, signal.SIGCONT)
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, out + err


def test_run_uses_the_cluster_at_ray_address_and_leaves_it_running(bench: Workspace, cluster: str) -> None:
    for _ in range(2):
        done = bench.tunery("run", str(bench.file), RAY_ADDRESS=cluster, WANDB_MODE="disabled", **ACCESS)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"connecting to Ray at {cluster}" in done.stdout
        (scored,) = bench.artifacts("score")
        bench.file.write_text(EXPERIMENT.replace("limit: 60", "limit: 50"))
        scored.rename(bench.folder / scored.name)


def test_cluster_with_another_token_is_reported_within_the_limit(bench: Workspace, cluster: str) -> None:
    begin = time.monotonic()
    other = {**ACCESS, "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    done = bench.tunery("run", str(bench.file), RAY_ADDRESS=cluster, WANDB_MODE="disabled", **other)
    assert time.monotonic() - begin < 60
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: no Ray cluster can be reached at RAY_ADDRESS={cluster}\n")
    assert "RAY_AUTH_TOKEN" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_unreachable_address_is_reported_within_seconds(bench: Workspace) -> None:
    begin = time.monotonic()
    done = bench.tunery("run", str(bench.file), RAY_ADDRESS="127.0.0.1:1", WANDB_MODE="disabled")
    assert time.monotonic() - begin < 30
    assert done.returncode == 1
    assert done.stderr.startswith("error: no Ray cluster can be reached at RAY_ADDRESS=127.0.0.1:1\n")
    assert "Traceback" not in done.stdout + done.stderr
