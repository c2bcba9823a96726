"""Job that describes every node of a cluster: versions, free resources, and whether store, data and models are visible.

    python -m tunery.jobs.probe '{"store": .., "paths": [..]}'

It prints one line: REPORT_PREFIX and a JSON list with an object per node (`NodeReport`).
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

from tunery.store import Store

REPORT_PREFIX = "tunery-probe: "
NODE_SECONDS = 60.0
"""Time limit for the reports of all nodes."""


def main() -> None:
    request = json.loads(sys.argv[1])
    print(REPORT_PREFIX + json.dumps(probe(Path(request["store"]), request["paths"])), flush=True)


def probe(store: Path, paths: list[str]) -> list[dict[str, Any]]:
    """Connect to the cluster and return a report per node; see jobs/preflight.py, `NodeReport`."""
    import ray
    from ray._private.state import available_resources_per_node
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    name = f".probe-{uuid.uuid4().hex}"
    with suppress(OSError):
        Store(store).create()
        (store / name).mkdir()
    free = available_resources_per_node()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    describe = ray.remote(num_cpus=0, max_retries=0)(describe_node)
    tasks = [
        describe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
            str(store / name), paths
        )
        for node in nodes
    ]
    ready, _ = ray.wait(tasks, num_returns=len(tasks), timeout=NODE_SECONDS)
    reports = []
    for node, task in zip(nodes, tasks, strict=True):
        report = ray.get(task) if task in ready else {"error": f"no answer within {NODE_SECONDS:.0f} s"}
        own_free, total = free.get(node["NodeID"], {}), node["Resources"]
        resources = {
            f"{name}_{kind}": float(values.get(kind.upper(), 0))
            for name, values in (("free", own_free), ("total", total))
            for kind in ("cpu", "gpu")
        }
        reports.append({"node": node["NodeManagerHostname"], **resources, **report})
    written = set()
    with suppress(OSError):
        written = {path.read_text() for path in (store / name).iterdir()}
    for report in reports:
        report["shares_store"] = report.pop("token", None) in written
    with suppress(OSError):
        for path in (store / name).iterdir():
            path.unlink()
        (store / name).rmdir()
    return reports


def describe_node(folder: str, paths: list[str]) -> dict[str, Any]:
    """Return versions and visible paths of the node that this runs on. Writes a token to `folder`, which the driver
    looks for: the same path may be a different file system on another node."""
    import ray
    import torch

    token = f"{platform.node()}-{os.getpid()}-{time.time_ns()}"
    with suppress(OSError):
        (Path(folder) / token).write_text(token)
    return {
        "token": token,
        "python": platform.python_version(),
        "ray": ray.__version__,
        "torch": torch.__version__.split("+")[0],
        "cuda": torch.version.cuda or "",
        "missing": [path for path in paths if not Path(path).exists()],
    }


if __name__ == "__main__":
    main()
