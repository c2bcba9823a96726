"""Lease: exclusive right to build an artifact. A file with a heartbeat, taken over when its owner is dead.

A thread of the owner touches the file every `HEARTBEAT` seconds. An owner on this host is dead when its process does
not exist (a stopped process is alive, however old its heartbeat). An owner on another host is dead when this process
has seen no heartbeat for `EXPIRY` seconds of its own monotonic clock: the clocks of hosts differ, so a heartbeat is a
changed modification time, not a recent one. Check and takeover happen under a file lock, so only one process can take
over a lease.

A paused machine or an outage of the storage may last longer than that. The former owner then still runs. It stops with
LeaseLost at its next heartbeat, and results are committed within `fenced()`, which raises LeaseLost too.

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
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

from tunery.errors import TuneryError
from tunery.interrupt import STOP
from tunery.store.atomic_write import write_text

HEARTBEAT = 5.0
"""Seconds."""
EXPIRY = 60.0
"""Seconds without a heartbeat after which an owner on another host is dead."""
POLL_SECONDS = 1.0
"""Interval of attempts to acquire a lease."""


class LeaseHeld(Exception):
    """Another live process holds the lease; `holder` describes it."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class LeaseLost(TuneryError):
    """Another process has taken over the lease of this one."""

    def __init__(self, name: str, holder: str) -> None:
        super().__init__(
            f"another process has taken over {name}: {holder}",
            cause=f"this process sent no heartbeat for {EXPIRY:.0f} s: it was paused, or could not reach the store",
            remedy="run the same command again: it uses what the other process has built",
        )


class Lease:
    """Context manager that holds the lease. Entering it raises LeaseHeld if another live process holds the lease, or
    waits if `wait` is given. Whether an owner on another host is alive may take EXPIRY seconds to find out.

    `wait` is called about once per second with a description of the owner; it may raise to give up.
    """

    def __init__(self, path: Path, wait: Callable[[str], None] | None = None) -> None:
        self.path = path
        self._wait = wait
        self.token = uuid.uuid4().hex
        """Unique to this object; part of the names of files that only this owner writes."""
        self._heartbeat_seen: tuple[Any, float] = (None, 0.0)
        """Last heartbeat of another owner, and the monotonic time at which it was first seen."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._holder = 0
        """The thread that has entered the context."""

    def __enter__(self) -> Lease:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while (holder := self._acquire()) is not None:
            STOP.check()
            if self._wait is not None:
                self._wait(holder)
            elif not self._may_be_dead():
                raise LeaseHeld(holder)
            time.sleep(POLL_SECONDS)
        self._holder = threading.get_ident()
        self._thread = threading.Thread(target=self._send_heartbeats, name=f"lease {self.path.name}", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            STOP.clear_error(self._holder)
        if self._is_owner():
            self.path.unlink(missing_ok=True)

    @contextmanager
    def fenced(self) -> Iterator[None]:
        """Keep other processes from taking over the lease inside the context. Raises LeaseLost if one has."""
        with self._lock():
            if not self._is_owner():
                owner = _read_owner(self.path)
                raise LeaseLost(self.path.name, _describe(owner) if owner else "its lease no longer exists")
            yield

    def _lock(self) -> FileLock:
        return FileLock(self.path.with_name(self.path.name + ".lock"))

    def _acquire(self) -> str | None:
        """Try to acquire the lease. Returns None, or a description of its owner, which may be alive."""
        with self._lock():
            if (other := _read_owner(self.path)) is not None and self._is_alive(other):
                return _describe(other)
            owner = {
                "token": self.token,
                "host": _host(),
                "pid": os.getpid(),
                "start": _process_start(os.getpid()),
            }
            write_text(self.path, json.dumps(owner), sync=False)  # after a power failure no owner is alive
            return None

    def _is_alive(self, owner: dict[str, Any]) -> bool:
        """Whether the owner is alive, as far as this process knows: another host's counts as alive until it has sent no
        heartbeat for EXPIRY seconds."""
        if owner["host"] == _host():
            return bool(_process_start(owner["pid"]) == owner["start"])
        heartbeat = (owner["token"], owner["modified_ns"])
        if heartbeat != self._heartbeat_seen[0]:
            self._heartbeat_seen = (heartbeat, time.monotonic())
        return time.monotonic() - self._heartbeat_seen[1] < EXPIRY

    def _may_be_dead(self) -> bool:
        """Whether to wait for a heartbeat of the owner: it is on another host, and by this host's clock the last one is
        old, or in the future."""
        owner = _read_owner(self.path)
        return owner is None or (owner["host"] != _host() and not 0 <= _age(owner) < EXPIRY)

    def _is_owner(self) -> bool:
        owner = _read_owner(self.path)
        return owner is not None and owner["token"] == self.token

    def _send_heartbeats(self) -> None:
        """Send heartbeats until the end. If another process has taken over the lease, the next wait of the holder (any
        `STOP.check`) raises LeaseLost."""
        while not self._stop.wait(HEARTBEAT):
            owner = _read_owner(self.path)  # None: the file system may be unavailable; the next heartbeat retries
            if owner is not None and owner["token"] != self.token:
                STOP.raise_in_thread(self._holder, LeaseLost(self.path.name, _describe(owner)))
                return
            if owner is not None:
                with suppress(OSError):
                    os.utime(self.path)


def active_owner(path: Path) -> str | None:
    """Return a description of the owner of the lease at `path`; None if there is none, or it seems dead.

    For messages only: an owner on another host is judged by this host's clock.
    """
    owner = _read_owner(path)
    if owner is None:
        return None
    if owner["host"] == _host():
        alive = _process_start(owner["pid"]) == owner["start"]
    else:
        alive = _age(owner) <= EXPIRY
    return _describe(owner) if alive else None


def live_owners(
    leases: Iterable[Lease], wait: Callable[[Collection[str]], object] = lambda owners: None
) -> dict[Lease, str]:
    """Return a description of the owner of each lease whose owner is alive. The others can then be acquired without
    waiting.

    Unlike `active_owner` this does not depend on clocks. If the last heartbeat of an owner on another host seems old,
    wait up to EXPIRY seconds for the next one; `wait` is called about once per second with those owners.
    """
    alive: dict[Lease, str] = {}
    unknown: dict[Lease, dict[str, Any]] = {}
    for lease in leases:
        owner = _read_owner(lease.path)
        if owner is not None and lease._is_alive(owner):
            if lease._may_be_dead():
                unknown[lease] = owner
            else:
                alive[lease] = _describe(owner)
    while unknown:
        STOP.check()
        wait(sorted({_describe(owner) for owner in unknown.values()}))
        time.sleep(POLL_SECONDS)
        for lease, before in list(unknown.items()):
            owner = _read_owner(lease.path)
            if owner is not None and owner != before:
                alive[lease] = _describe(owner)
            if owner is None or owner != before or not lease._is_alive(owner):
                del unknown[lease]
    return alive


def _read_owner(path: Path) -> dict[str, Any] | None:
    """Return the owner of a lease, with the modification time of the file; None if there is no complete one."""
    try:
        owner = json.loads(path.read_text())
        return {
            **{key: owner[key] for key in ("token", "host", "pid", "start")},
            "modified_ns": path.stat().st_mtime_ns,
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _describe(owner: dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host'].split()[0]}"


def _age(owner: dict[str, Any]) -> float:
    return time.time() - float(owner["modified_ns"]) / 1e9


@cache
def _host() -> str:
    """Return host name, boot id and PID namespace. Hosts may share a name, and containers of a host the boot id too."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


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
