"""Lease: exclusive right to build an artifact. A file with a heartbeat, taken over when its owner is dead.

A thread of the owner touches the file every `HEARTBEAT` seconds. An owner on this host is dead when its process does
not exist (a stopped process is alive, however old its heartbeat), an owner on another host when the file has not been
touched for `EXPIRY` seconds. Check and takeover happen under a file lock, so only one process can take over a lease.

filelock's SoftFileLease (4.2) expires by age on this host too: it is taken over from a stopped process, and from a
killed process that is not yet reaped only after its duration.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from filelock import FileLock

from tunery.interrupt import STOP

HEARTBEAT = 5.0
"""Seconds."""
EXPIRY = 60.0
"""Seconds."""


class LeaseHeld(Exception):
    """Another live process holds the lease; `holder` describes it."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class Lease:
    """Context manager that holds the lease. Entering it raises LeaseHeld if another live process holds the lease, or
    waits if `wait` is given.

    `wait` is called about once per second with a description of the owner; it may raise to give up.
    """

    def __init__(self, path: Path, wait: Callable[[str], None] | None = None) -> None:
        self.path = path
        self._wait = wait
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while (holder := self._acquire()) is not None:
            if self._wait is None:
                raise LeaseHeld(holder)
            STOP.check()
            self._wait(holder)
            time.sleep(1.0)
        self._thread = threading.Thread(target=self._send_heartbeats, name=f"lease {self.path.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._is_owner():
            self.path.unlink(missing_ok=True)

    def _acquire(self) -> str | None:
        """Try to acquire the lease. Returns None, or a description of its live owner."""
        with FileLock(self.path.with_name(self.path.name + ".lock")):
            if self.path.exists() and (holder := active_owner(self.path)) is not None:
                return holder
            owner = {
                "token": self._token,
                "host": _host(),
                "pid": os.getpid(),
                "start": _process_start(os.getpid()),
            }
            temporary = self.path.with_name(f"{self.path.name}.{self._token}")
            temporary.write_text(json.dumps(owner))
            temporary.replace(self.path)
            return None

    def _is_owner(self) -> bool:
        try:
            return bool(json.loads(self.path.read_text()).get("token") == self._token)
        except (OSError, ValueError):
            return False

    def _send_heartbeats(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            if self._is_owner():
                with suppress(OSError):  # the file system may be unavailable for a moment; the next heartbeat retries
                    os.utime(self.path)


def active_owner(path: Path) -> str | None:
    """Return a description of the live owner of the lease at `path`; None if there is none."""
    try:
        owner = json.loads(path.read_text())
        age = time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    dead = _process_start(owner["pid"]) != owner["start"] if owner["host"] == _host() else age > EXPIRY
    return None if dead else f"process {owner['pid']} on {owner['host']}"


def _host() -> str:
    """Return host name and PID namespace: containers may share a host name but not their process ids."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _process_start(pid: int) -> str:
    """Return the start time of process `pid` (jiffies since boot), which distinguishes a reused pid.

    "" if the process does not exist or is a zombie. Without /proc, "alive" if the process exists.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return "" if fields[0] in "ZX" else fields[19]
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self").exists():
            return ""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return ""
    except PermissionError:
        pass
    return "alive"
