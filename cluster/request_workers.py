"""Make Ray's autoscaler start nodes, wait for them, and then run a command in place of this process.

    python request_workers.py --gpus 8 -- tunery run experiment.yaml --store /shared/store
    python request_workers.py --gpus 0    # withdraws the request; idle nodes are removed

tunery checks that the workers of an experiment fit on the nodes that the cluster has, so nodes that the autoscaler has
not started yet must be requested before. Ray keeps the request until another one replaces it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping

POLL_SECONDS = 2.0


def bundles(gpus: int, cpus: int) -> list[dict[str, float]]:
    """Return resources as Ray's autoscaler takes them: bundles that each fit on one node."""
    return [{"GPU": 1, "CPU": 1}] * gpus or [{"CPU": 1}] * cpus


def missing(gpus: int, cpus: int, resources: Mapping[str, float]) -> str:
    """Return what the cluster with `resources` lacks, "" if nothing."""
    wanted = {"GPU": gpus, "CPU": cpus}
    return ", ".join(
        f"{int(resources.get(name, 0))} of {count} {name}s"
        for name, count in wanted.items()
        if resources.get(name, 0) < count
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that the cluster should have")
    parser.add_argument("--cpus", type=int, default=0, help="CPU cores that the cluster should have, without --gpus")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds to wait (%(default)s)")
    parser.add_argument("command", nargs="*", metavar="-- COMMAND", help="started when the nodes have joined")
    arguments = parser.parse_args()
    import ray
    from ray.autoscaler.sdk import request_resources

    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    request_resources(bundles=bundles(arguments.gpus, arguments.cpus))
    end = time.monotonic() + arguments.timeout
    while lacks := missing(arguments.gpus, arguments.cpus, ray.cluster_resources()):
        if time.monotonic() > end:
            print(f"error: the cluster has {lacks} after {arguments.timeout:.0f} s", file=sys.stderr)
            print("remedy: see `ray status` on the head node: quota, max_workers, pending nodes", file=sys.stderr)
            return 1
        time.sleep(POLL_SECONDS)
    ray.shutdown()
    if arguments.command:
        sys.stdout.flush()
        os.execvp(arguments.command[0], arguments.command)  # signals to this process then reach the command
    return 0


if __name__ == "__main__":
    sys.exit(main())
