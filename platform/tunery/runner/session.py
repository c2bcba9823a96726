"""Ray, started once a run; and what libraries print, kept out of the terminal."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from tunery.errors import TuneryError
from tunery.runner.compute import Hardware
from tunery.spec import Compute
from tunery.track.events import EventLog

QUIET = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # Ray Train would print each worker's lines, 1,600 of them in a short run
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    # A stopped trial ends what it is at before its process is reused. After the 2 s that Tune (2.60) waits by itself it
    # gives the process up, marks the next trial as failed, and tells nobody: a search of that length never ended.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL (1.16) would tell its makers of every trainer
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}


class RaySession:
    """Ray, started at the first need and then kept."""

    def __init__(self, log: EventLog, logs: Path) -> None:
        self._log = log
        self._logs = logs
        self._hardware: Hardware | None = None

    @property
    def hardware(self) -> Hardware | None:
        """None while Ray has not been needed."""
        return self._hardware

    def start(self, compute: Compute) -> Hardware:
        """Connects to RAY_ADDRESS, or starts Ray here with all CPUs and GPUs. Again and again does nothing."""
        if self._hardware is not None:
            return self._hardware
        begin = time.time()
        # Else a thread that an interrupt leaves behind (tunery/interrupt.py) would start Ray again by its next call.
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
        import logging

        import ray

        if os.environ.get("RAY_ADDRESS"):
            where = f"the cluster at {os.environ['RAY_ADDRESS']}"
            try:
                ray.init(
                    log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": _worker_environment()}
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise TuneryError(
                    f"no Ray cluster answers at RAY_ADDRESS={os.environ['RAY_ADDRESS']}",
                    cause=str(error).strip().splitlines()[-1],
                    remedy="start it, correct the address, or unset RAY_ADDRESS to start Ray here",
                ) from error
        else:
            where = "this machine"
            # Workers inherit it from this process; as a runtime_env it costs each new worker process 1.3 s (2 cores).
            os.environ.update(_worker_environment())
            gigabytes = 0.5 if compute.object_store_gb == "auto" else compute.object_store_gb
            ray.init(
                address="local",  # not a cluster that happens to run here: RAY_ADDRESS names the one that is meant
                num_cpus=len(os.sched_getaffinity(0)),
                object_store_memory=int(gigabytes * 1e9),
                include_dashboard=compute.workers_per_trial not in ("auto", 1) and _dashboard_is_there(),
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
            _link_logs(self._logs)
        resources = ray.cluster_resources()
        self._hardware = Hardware(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), where)
        self._log.write("ray_started", seconds=time.time() - begin)
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        return self._hardware

    def stop(self) -> None:
        if self._hardware is not None:
            import ray

            ray.shutdown()


def _worker_environment() -> dict[str, str]:
    """Workers import the tunery that the driver runs, also from a source tree that is not installed."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(dict.fromkeys([root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    return {**QUIET, "PYTHONPATH": path}


def _dashboard_is_there() -> bool:
    """Its State API frees the resources of stopped trials that have workers of their own (Ray 2.60); nothing else here
    needs it, and it costs 1.5 s and a dozen processes. Bare installations of Ray lack it."""
    import importlib.util

    return importlib.util.find_spec("aiohttp_cors") is not None


def _link_logs(logs: Path) -> None:
    """Ray's own logs stay in its session folder; the run's log folder points there."""
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    link = logs / "ray"
    link.unlink(missing_ok=True)
    link.symlink_to(session / "logs")


@contextmanager
def noise_to(path: Path) -> Iterator[TextIO]:
    """While inside, whatever any library prints (C++ too) goes to `path`; yields the real standard output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(QUIET)
    sys.stdout.flush()
    sys.stderr.flush()
    real_out, real_err = os.dup(1), os.dup(2)
    noise = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(noise, 1)
    os.dup2(noise, 2)
    os.close(noise)
    terminal = os.fdopen(os.dup(real_out), "w", encoding="utf-8")
    try:
        yield terminal
    finally:
        terminal.flush()
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(real_out, 1)
        os.dup2(real_err, 2)
        os.close(real_out)
        os.close(real_err)
        terminal.close()
