"""A Ray cluster of several nodes on this machine (cluster/local.sh)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "cluster" / "local.sh"
RESERVED = """
import ray, time
ray.init(log_to_driver=False, logging_level="ERROR")
def reserved():
    return ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
end = time.time() + 30
while reserved() and time.time() < end:
    time.sleep(1)
print("reserved", reserved())
"""


class LocalCluster:
    """`nodes` nodes with `cpus` CPUs each. Its token, process ids and logs are in the folder `state`."""

    def __init__(self, state: Path, nodes: int, cpus: int) -> None:
        self._state, self._size = state, (nodes, cpus)
        ray = Path(sys.executable).parent / "ray"
        self._environment = {**os.environ, "TUNERY_CLUSTER": str(state), "RAY": str(ray)}

    def start(self) -> None:
        """Start the nodes, after those of an earlier start were stopped. Raises RuntimeError if one does not start."""
        self.stop()
        words = ["start", *map(str, self._size)]
        started = subprocess.run(
            [SCRIPT, *words], env=self._environment, capture_output=True, text=True, check=False, timeout=200
        )
        if started.returncode:
            raise RuntimeError(started.stderr)
        exported = started.stdout.replace("export ", "").split()
        self.environment = dict(word.split("=", 1) for word in exported)
        """Environment variables for `tunery submit`."""

    def stop(self) -> None:
        for group in self.groups():
            with suppress(ProcessLookupError):
                os.killpg(group, signal.SIGCONT)
        subprocess.run([SCRIPT, "stop"], env=self._environment, check=True, capture_output=True, timeout=60)

    def groups(self) -> list[int]:
        """Return the process groups of the nodes, the head first."""
        path = self._state / "pids"
        return [int(line) for line in path.read_text().split()] if path.is_file() else []

    @property
    def driver_environment(self) -> dict[str, str]:
        """Environment variables for `tunery run`."""
        return {**self.environment, "RAY_ADDRESS": (self._state / "address").read_text().strip()}

    def reserved_cpus(self) -> float:
        """Return how many CPUs are reserved after a run, which may take up to 30 s to return them; NaN if the cluster
        does not answer."""
        environment = {**os.environ, **self.driver_environment}
        done = subprocess.run(
            [sys.executable, "-c", RESERVED], env=environment, capture_output=True, text=True, check=False, timeout=120
        )
        return float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")
