"""A Ray cluster of several nodes on this machine (cluster/local.sh)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil

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


def signal_node(group: int, number: int) -> None:
    """Send a signal to all processes of a node."""
    for process in psutil.process_iter():
        if node_group(process) == group:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def node_group(process: psutil.Process) -> int:
    """Return the process group that the node of a process was started in; -1 if it has ended."""
    try:
        return os.getsid(process.pid)
    except ProcessLookupError:
        return -1


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


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
            signal_node(group, signal.SIGCONT)
        subprocess.run([SCRIPT, "stop"], env=self._environment, check=True, capture_output=True, timeout=60)

    def groups(self) -> list[int]:
        """Return the process groups of the nodes, the head first."""
        path = self._state / "pids"
        return [int(line) for line in path.read_text().split()] if path.is_file() else []

    def processes(self, title: str) -> list[psutil.Process]:
        """Return the processes of all nodes whose command line starts with `title`, such as `ray::RayTrainWorker`."""
        groups = self.groups()
        return [
            process
            for process in psutil.process_iter()
            if _command_line(process).startswith(title) and node_group(process) in groups
        ]

    def node_of_a_worker(self, title: str) -> int:
        """Return the process group of a node, not the head, that has such a process."""
        return next(group for process in self.processes(title) if (group := node_group(process)) != self.groups()[0])

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
