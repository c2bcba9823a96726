"""Start Ray once per run, and redirect the output of libraries from the terminal to a log file."""

from __future__ import annotations

import os
import secrets
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from tunery.errors import TuneryError
from tunery.events.event_log import EventLog
from tunery.interrupt import STOP, BackgroundCall
from tunery.pipeline.compute import Hardware
from tunery.pipeline.ray_address import CONNECT_SECONDS, check_reachable, cluster_address, connection_failed
from tunery.spec import Compute
from tunery.workers.cluster_resources import total_resources
from tunery.workers.worker_group import CurrentWorkerGroup

QUIET_ENV = {
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # Ray Train would print the output of all workers, 1,600 lines in a short run
    # Other jobs may use the cluster, nodes may have to start, and the workers import torch from a slow file system.
    # After its default of 60 s Ray Train (2.60) fails the run.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "3600",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_AUTO_CALLBACK_SYNCER": "1",
    # A stopped trial finishes its current step before its process is reused. After its default of 2 s Tune (2.60)
    # abandons the process and marks the next trial as failed without calling callbacks, so the search never ends.
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "600",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DISABLE_IMPORT_WARNING": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # TRL (1.16) would report every trainer
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
}

RAY_POLL_SECONDS = 0.005
"""Ray's C++ code replaces the SIGTERM handler while Ray starts and ends; interval at which it is installed again."""
STOP_SECONDS = 30.0


class RaySession:
    """Starts Ray when it is first needed and keeps it running."""

    def __init__(self, log: EventLog, logs: Path) -> None:
        self._log = log
        self._logs = logs
        self._hardware: Hardware | None = None
        self._starting: BackgroundCall[Any] | None = None
        self._ended = threading.Event()
        self.workers = CurrentWorkerGroup(logs)
        """The workers of the run; usable once Ray has been started."""

    @property
    def hardware(self) -> Hardware | None:
        """None if Ray has not been started."""
        return self._hardware

    def start(self, compute: Compute) -> Hardware:
        """Connect to RAY_ADDRESS, or start Ray on this machine with all CPUs and GPUs. A second call does nothing.

        Raises RequestError for an invalid address, TuneryError if no cluster answers within CONNECT_SECONDS.
        """
        if self._hardware is not None:
            return self._hardware
        start_time = time.time()
        # Otherwise a background thread that outlives an interrupt (tunery/interrupt.py) would start Ray again.
        os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
        if (address := cluster_address()) is not None:
            where = f"the cluster at {address}"
            self._connect(address)
        else:
            where = "this machine"
            self._start_here(compute)
        self._hardware = Hardware(total_resources(), where)
        self._log.write("ray_started", seconds=time.time() - start_time)
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
        # Workers inherit the environment of this process; a runtime_env costs 1.3 s per worker process (2 cores).
        os.environ.update(_worker_environment())
        _require_token()
        gigabytes = 0.5 if compute.object_store_gb == "auto" else compute.object_store_gb
        self._init(
            None,
            address="local",  # never a cluster that happens to run on this machine: only RAY_ADDRESS selects one
            num_cpus=len(os.sched_getaffinity(0)),
            object_store_memory=int(gigabytes * 1e9),
            include_dashboard=compute.workers_per_trial not in ("auto", 1) and _has_dashboard(),
            _temp_dir=str(_private_temp_dir()),
        )
        _link_logs(self._logs)

    def _init(self, seconds: float | None, **arguments: Any) -> bool:
        """Run `ray.init` for up to `seconds` and return whether it has ended. Runs in a background thread: in the main
        thread it would install its own SIGTERM handler and block Python's."""

        def init() -> None:
            import logging

            import ray

            _disable_ray_signal_handlers(starting=True)
            with _start_new_session():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **arguments)

        # The processes of Ray die with the thread that started them.
        self._starting = BackgroundCall(init, keep=self._ended)
        ended = self._starting.wait(seconds, RAY_POLL_SECONDS)
        if ended:
            self._starting.result()
        return ended

    def stop(self) -> None:
        """Shut down Ray if it was started. If it is still starting, wait for up to STOP_SECONDS."""
        if self._starting is None or not self._wait(self._starting):
            return
        import ray

        if ray.is_initialized():
            _disable_ray_signal_handlers(starting=False)
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


def _disable_ray_signal_handlers(*, starting: bool) -> None:
    """Keep Ray's C++ code (2.60) from replacing the SIGTERM handler: InstallFailureSignalHandler in `ray.init` does
    nothing if this flag is set, UninstallSignalAction in `ray.shutdown` does nothing if it is not set.

    Without the flag, a SIGTERM in the milliseconds before the next StopSignals.install() would end the process.
    """
    import ctypes

    import ray._raylet

    with suppress(OSError, ValueError):
        flag = "_ZN3ray6RayLog36is_failure_signal_handler_installed_E"
        ctypes.c_bool.in_dll(ctypes.CDLL(ray._raylet.__file__), flag).value = starting


@contextmanager
def _start_new_session() -> Iterator[None]:
    """Start the processes of Ray (2.60) in a new session, so that signals to this process group do not reach them. A
    raylet that is terminated also exits the driver (core_worker, QuickExit), which must first write its report."""
    from ray._private import services

    popen = services.ConsolePopen
    services.ConsolePopen = partial(popen, start_new_session=True)
    try:
        yield
    finally:
        services.ConsolePopen = popen


def _worker_environment() -> dict[str, str]:
    """Return the environment of workers. They import the same tunery as the driver, also from a source tree."""
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(dict.fromkeys([root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]))
    return {**QUIET_ENV, "PYTHONPATH": path}


def _require_token() -> None:
    """Make the processes of Ray accept connections with a token of this run only, unless RAY_AUTH_MODE is set. Ray
    listens on all interfaces, and whoever can connect can run code.

    Ray (2.60) reads the variables when it is imported, so a process that has imported it before starts it without: only
    tests do.
    """
    if "ray" in sys.modules:
        return
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if not {"RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"} & os.environ.keys():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _private_temp_dir() -> Path:
    """Return the folder for logs and sockets of Ray, in one that only this user can enter: Ray (2.60) makes its folders
    and sockets accessible to all users."""
    parent = Path(os.environ.get("RAY_TMPDIR") or "/tmp") / f"tunery-{os.getuid()}"
    with suppress(FileExistsError):
        parent.mkdir(mode=0o700, parents=True)
    status = parent.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise TuneryError(
            f"{parent} belongs to another user, or is not a folder",
            cause="the sockets of Ray would be accessible to that user",
            remedy="set RAY_TMPDIR to a folder of your own, with a path shorter than 40 characters",
        )
    if stat.S_IMODE(status.st_mode) != 0o700:
        parent.chmod(0o700)
    return parent / "ray"


def _has_dashboard() -> bool:
    """Whether the dashboard is installed. Ray Train (2.60) needs its State API to free the workers of a trial whose
    process died. Nothing else needs it, and it costs 1.5 s and a dozen processes."""
    import importlib.util

    return importlib.util.find_spec("aiohttp_cors") is not None


def _link_logs(logs: Path) -> None:
    """Link the logs of Ray, which stay in its session folder, into the log folder of the run."""
    import ray

    session = Path(ray._private.worker._global_node.get_session_dir_path())
    link = logs / "ray"
    link.unlink(missing_ok=True)
    link.symlink_to(session / "logs")


@contextmanager
def redirect_output(path: Path) -> Iterator[TextIO]:
    """Redirect the output of all libraries (also of C++ code) to `path`; yields the real standard output."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.environ.update(QUIET_ENV)
    sys.stdout.flush()
    sys.stderr.flush()
    real_out, real_err = os.dup(1), os.dup(2)
    log_file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(log_file, 1)
    os.dup2(log_file, 2)
    os.close(log_file)
    terminal = os.fdopen(os.dup(real_out), "w", encoding="utf-8")
    try:
        yield terminal
    finally:
        for stream in (terminal, sys.stdout, sys.stderr):
            with suppress(OSError):  # a full disk or a closed pipe must not hide the error of the run
                stream.flush()
        os.dup2(real_out, 1)
        os.dup2(real_err, 2)
        os.close(real_out)
        os.close(real_err)
        with suppress(OSError):
            terminal.close()
