"""A lease: who is making an artifact right now. A file with a heartbeat, taken over when its holder is dead.

The holder touches the file every `HEARTBEAT` seconds from a thread. A process of this host counts as dead when it no
longer runs (one that is only stopped lives, however old its last heartbeat), a process of another host when the file
has not been touched for `EXPIRY` seconds.
Checking and taking over happen under a file lock, so that two who find the same dead holder can't both succeed.
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
EXPIRY = 60.0


class LeaseHeld(Exception):
    """Somebody else holds the lease, and lives. `holder` tells who."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class Lease:
    """`with Lease(path): ...` holds the lease; entering raises LeaseHeld while another lives, unless `wait` is given.

    `wait` is called about once a second with the holder's description; it may raise to give up.
    """

    def __init__(self, path: Path, wait: Callable[[str], None] | None = None) -> None:
        self.path = path
        self._wait = wait
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Lease:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while (holder := self._take()) is not None:
            if self._wait is None:
                raise LeaseHeld(holder)
            STOP.check()
            self._wait(holder)
            time.sleep(1.0)
        self._thread = threading.Thread(target=self._beat, name=f"lease {self.path.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._is_ours():
            self.path.unlink(missing_ok=True)

    def _take(self) -> str | None:
        """None when the lease is ours now, else who holds it."""
        with FileLock(self.path.with_name(self.path.name + ".lock")):
            if self.path.exists() and (holder := active_owner(self.path)) is not None:
                return holder
            owner = {
                "token": self._token,
                "host": _host(),
                "pid": os.getpid(),
                "start": _start(os.getpid()),
            }
            temporary = self.path.with_name(f"{self.path.name}.{self._token}")
            temporary.write_text(json.dumps(owner))
            temporary.replace(self.path)
            return None

    def _is_ours(self) -> bool:
        try:
            return bool(json.loads(self.path.read_text()).get("token") == self._token)
        except (OSError, ValueError):
            return False

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            if self._is_ours():
                with suppress(OSError):  # a file system that is away for a moment: the next beat tells
                    os.utime(self.path)


def active_owner(path: Path) -> str | None:
    """Who holds the lease at `path`; None when nobody does, or who did is dead."""
    try:
        owner = json.loads(path.read_text())
        age = time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    dead = _start(owner["pid"]) != owner["start"] if owner["host"] == _host() else age > EXPIRY
    return None if dead else f"process {owner['pid']} on {owner['host']}"


def _host() -> str:
    """Host and process namespace: two containers may share a host's name, and each other's process numbers mean
    nothing to them."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _start(pid: int) -> str:
    """When process `pid` started (jiffies since boot), so that a reused pid is not taken for its former owner.

    "" when there is no such process, or only what is left of it until its parent asks (a zombie). Where /proc is
    missing, whether it lives is all that can be told.
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
