"""Ray, started once a run; and what libraries print, kept out of the terminal."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tunery.events.event_log import EventLog
from tunery.interrupt import STOP, BackgroundCall
from tunery.pipeline.compute import Hardware
from tunery.pipeline.ray_address import CONNECT_SECONDS, check_reachable, cluster_address, connection_failed
from tunery.spec import Compute

QUIET_ENV = {
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

RAY_POLL_SECONDS = 0.005
"""While Ray starts and ends, its C++ code takes SIGTERM's handler: so often it is put back (StopSignals.install)."""
STOP_SECONDS = 30.0


class RaySession:
    """Ray, started at the first need and then kept."""

    def __init__(self, log: EventLog, logs: Path) -> None:
        self._log = log
        self._logs = logs
        self._hardware: Hardware | None = None
        self._starting: BackgroundCall[Any] | None = None
        self._ended = threading.Event()

    @property
    def hardware(self) -> Hardware | None:
        """None while Ray has not been needed."""
        return self._hardware

    def start(self, compute: Compute) -> Hardware:
        """Connect to RAY_ADDRESS, or start Ray here with all CPUs and GPUs; a second call does nothing.

        Raises RequestError for an address that can't be one, TuneryError when no cluster answers there within
        CONNECT_SECONDS.
        """
        if self._hardware is not None:
            return self._hardware
        begin = time.time()
        # Else a thread that an interrupt leaves behind (tunery/interrupt.py) would start Ray again by its next call.
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
        if (address := cluster_address()) is not None:
            where = f"the cluster at {address}"
            self._connect(address)
        else:
            where = "this machine"
            self._start_here(compute)
        import ray

        resources = ray.cluster_resources()
        self._hardware = Hardware(int(resources.get("CPU", 0)), int(resources.get("GPU", 0)), where)
        self._log.write("ray_started", seconds=time.time() - begin)
        import ray.data

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        return self._hardware

    def _connect(self, address: str) -> None:
        self._log.write("ray_connecting", address=address, limit=CONNECT_SECONDS)
        end = time.monotonic() + CONNECT_SECONDS
        if address != "auto":
            check_reachable(address)
        try:
            connected = self._init(
                end - time.monotonic(), address=address, runtime_env={"env_vars": _worker_environment()}
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise connection_failed(address, error) from error
        if not connected:
            raise connection_failed(address, None)

    def _start_here(self, compute: Compute) -> None:
        # Workers inherit it from this process; as a runtime_env it costs each new worker process 1.3 s (2 cores).
        os.environ.update(_worker_environment())
        gigabytes = 0.5 if compute.object_store_gb == "auto" else compute.object_store_gb
        self._init(
            None,
            address="local",  # not a cluster that happens to run here: RAY_ADDRESS names the one that is meant
            num_cpus=len(os.sched_getaffinity(0)),
            object_store_memory=int(gigabytes * 1e9),
            include_dashboard=compute.workers_per_trial not in ("auto", 1) and _dashboard_is_there(),
        )
        _link_logs(self._logs)

    def _init(self, seconds: float | None, **arguments: Any) -> bool:
        """`ray.init`, at most so long; returns whether it has ended. Not in the main thread, where it would put a
        SIGTERM handler of its own and keep Python's waiting."""

        def init() -> None:
            import logging

            import ray

            _leave_signals_alone(starting=True)
            with _processes_in_another_session():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)

        # Ray's processes die with the thread that started them.
        self._starting = BackgroundCall(init, keep=self._ended)
        ended = self._starting.wait(seconds, RAY_POLL_SECONDS)
        if ended:
            self._starting.result()
        return ended

    def stop(self) -> None:
        """Shut Ray down, if it was started; one that is still starting is waited for, at most STOP_SECONDS."""
        if self._starting is None or not self._wait(self._starting):
            return
        import ray

        if ray.is_initialized():
            _leave_signals_alone(starting=False)
            shutdown = BackgroundCall(ray.shutdown)
            if self._wait(shutdown):
                self._ended.set()
                shutdown.result()

    def _wait(self, call: BackgroundCall[Any]) -> bool:
        end = time.monotonic() + STOP_SECONDS
        while not call.wait(RAY_POLL_SECONDS, RAY_POLL_SECONDS):
            if STOP.hurried or time.monotonic() > end:
                return False
        return True


def _leave_signals_alone(*, starting: bool) -> None:
    """Keep Ray's C++ code (2.60) from replacing SIGTERM's handler: InstallFailureSignalHandler within `ray.init` does
    nothing where this flag is set already, UninstallSignalAction within `ray.shutdown` where it is not.

    A SIGTERM between that and the next StopSignals.install() would end the process; a Ray without the flag leaves that
    gap of milliseconds.
    """
    import ctypes

    import ray._raylet

    with suppress(OSError, ValueError):
        flag = "_ZN3ray6RayLog36is_failure_signal_handler_installed_E"
        ctypes.c_bool.in_dll(ctypes.CDLL(ray._raylet.__file__), flag).value = starting


@contextmanager
def _processes_in_another_session() -> Iterator[None]:
    """Ray's (2.60) processes, started while inside, get no signal that is sent to this process's group: a raylet that
    SIGTERM ends takes the driver along (core_worker, QuickExit), which has its report to write and ends Ray itself."""
    from ray._private import services

    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def _worker_environment() -> dict[str, str]:
    """Workers import the tunery that the driver runs, also from a source tree that is not installed."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(dict.fromkeys([root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    return {**QUIET_ENV, "PYTHONPATH": path}


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
def redirect_output(path: Path) -> Iterator[TextIO]:
    """While inside, whatever any library prints (C++ too) goes to `path`; yields the real standard output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(QUIET_ENV)
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
        for stream in (terminal, sys.stdout, sys.stderr):
            with suppress(OSError):  # a full disk, or a reader that went away: the run's own error matters more
                stream.flush()
        os.dup2(real_out, 1)
        os.dup2(real_err, 2)
        os.close(real_out)
        os.close(real_err)
        with suppress(OSError):
            terminal.close()
