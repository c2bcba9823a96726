"""SIGINT and SIGTERM stop a run cleanly at any moment; and a last message when the process is gone at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, ClassVar, Generic, TypeVar

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
REPEAT_SECONDS = 5.0
"""An interrupt that got lost (raised in a destructor or a callback of C code, where Python drops it) is raised again
after this time. Longer than leases and actor pools take to close on the way out."""
SAME_SIGNAL_SECONDS = 1.0
"""Signals within this time count as one: a terminal signals the whole process group, and wrappers (timeout, npm, a
Slurm step) pass their own on."""
HURRY = 2
"""So many signals, and closing no longer waits for Ray and W&B."""
GIVE_UP = 3
"""So many, and the process ends at once, whatever it is doing."""
EXIT_CODE = 130
AT_ONCE = b"!"
STOPPED_AT_ONCE = (
    b"\nstopped at once, without a report; the same command goes on from the last finished stage or checkpoint\n"
)
POLL_SECONDS = 0.2


class StopSignals:
    """SIGINT and SIGTERM of this process: the first one requests a clean stop.

    Raising KeyboardInterrupt in the handler is not enough: the exception can be dropped on its way, and Ray replaces
    handlers. So the request is kept: `check()` raises it again at every stage boundary and in every wait of ours, and
    a timer raises it again until it has arrived where the run is closed (`held()`).
    """

    def __init__(self) -> None:
        self._count = 0
        self._last = 0.0
        self._held = False
        self._installed = False
        self._armed = False
        self._alarm_before: Any = None
        self.last_words: int | None = None
        """Where `report_abrupt_exit` waits for the end of this process."""

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self._count > 0

    @property
    def hurried(self) -> bool:
        """Whether there was another signal, later, because closing takes long."""
        return self._count >= HURRY

    def check(self) -> None:
        """Raise KeyboardInterrupt when a stop was requested, outside of `held()`."""
        if self._count and not self._held:
            raise KeyboardInterrupt

    def forget(self) -> None:
        """The request was served, and the work goes on: where Ctrl-C is how a user ends a part of a command."""
        self._count = 0
        self._disarm()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle both signals while inside; nested uses share one state. SIGINT also where a shell has left it ignored,
        as it does in what it starts in the background: `kill -INT` stops such a run as well.

        Only the main thread can handle signals: in others this does nothing, and the embedding program decides.
        """
        if self._installed or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._count, self._last, self._held = 0, 0.0, False
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        self._installed = True
        try:
            self.install()
            yield
        finally:
            self._disarm()
            self._installed = False
            for number, handler in before.items():
                if handler is not None:  # one of C code's, which Python can't put back
                    signal.signal(number, handler)

    def install(self) -> None:
        """Put the handlers in place once more: Ray's C++ code (2.60, RayLog::InstallFailureSignalHandler within
        `ray.init`, RayLog::UninstallSignalAction within `ray.shutdown`) replaces that of SIGTERM without Python's
        knowledge. Does nothing outside of `handled()` and in other threads than the main one."""
        if self._installed and threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While inside, signals are counted and interrupt nothing: for what must be done whole, as a run's start and
        its end (report, W&B, Ray)."""
        before, self._held = self._held, True
        self._disarm()
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def released(self) -> Iterator[None]:
        """Within `held()`: while inside, signals interrupt again. Raises KeyboardInterrupt when one came before."""
        before, self._held = self._held, False
        try:
            self.check()
            yield
        finally:
            self._held = before
            self._disarm()

    def _arm(self) -> None:
        """From the first signal on only: the timer may be another's until then (pytest-timeout uses it)."""
        if not self._armed:
            self._armed = True
            self._alarm_before = signal.signal(signal.SIGALRM, self._on_alarm)
            signal.setitimer(signal.ITIMER_REAL, REPEAT_SECONDS, REPEAT_SECONDS)

    def _disarm(self) -> None:
        if self._armed:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._alarm_before)
            self._armed = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._count and now - self._last < SAME_SIGNAL_SECONDS:
            return
        self._count, self._last = self._count + 1, now
        if self._count >= GIVE_UP:
            if self.last_words is not None:
                os.write(self.last_words, AT_ONCE)
            os._exit(EXIT_CODE)
        if not self._held:
            self._arm()
            raise KeyboardInterrupt

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        self.check()


STOP = StopSignals()
"""Signals belong to the process, and so does this."""


class BackgroundCall(Generic[T]):
    """`call()` in a thread of its own, from now on.

    Ray Train (2.60) puts its own SIGINT handler in the main thread and never takes it away, Ray Tune swallows the
    first interrupt, and `ray.init` puts a SIGTERM handler there; in other threads all of them leave signals alone.
    """

    unfinished: ClassVar[set[BackgroundCall[Any]]] = set()

    def __init__(self, call: Callable[[], T], keep: threading.Event | None = None) -> None:
        """With `keep` the thread outlives the call until that is set: Linux sends the signal that a child wishes at its
        parent's death (PR_SET_PDEATHSIG) when the thread ends that started it."""
        self._outcome: list[T] = []
        self._error: list[BaseException] = []
        # Not Thread.join: interrupted, it takes a living thread for ended (Python 3.11, _wait_for_tstate_lock).
        self._done = threading.Event()

        def run() -> None:
            try:
                self._outcome.append(call())
            except BaseException as raised:
                self._error.append(raised)
            finally:
                self.unfinished.discard(self)
                self._done.set()
            if keep is not None:
                keep.wait()

        self.unfinished.add(self)
        threading.Thread(target=run, name="background call", daemon=True).start()

    def wait(self, seconds: float | None = None, poll: float = POLL_SECONDS) -> bool:
        """Wait until the call has ended, at most so long; returns whether it has. Signals are handled meanwhile."""
        end = None if seconds is None else time.monotonic() + seconds
        while not self._done.is_set():
            STOP.install()
            STOP.check()
            if end is not None and time.monotonic() >= end:
                return False
            self._done.wait(poll)
        STOP.install()
        STOP.check()
        return True

    def result(self) -> T:
        """What the call returned, or raised, once it has ended."""
        if self._error:
            raise self._error[0]
        return self._outcome[0]


def left_behind() -> bool:
    """Whether a background call has not ended. Such a process must end by os._exit: Python (3.11) ends a daemon thread
    that comes back from C++ code during its finalization, and C++ then aborts."""
    return bool(BackgroundCall.unfinished)


def interruptible(call: Callable[[], T]) -> T:
    """`call()` in a thread of its own, while the main thread stays open to signals. After an interrupt the thread is
    left behind: it ends with the process, or with an error once Ray is shut down."""
    background = BackgroundCall(call)
    background.wait()
    return background.result()


@contextmanager
def report_abrupt_exit(words: str) -> Iterator[None]:
    """While inside, `words` go to standard error if this process ends without leaving.

    That is so after kill -9, and when Ray's node process (raylet) dies: Ray 2.60 then ends the driver from C++
    (core_worker, QuickExit), where no handler of Python's runs, and standard error is a log file by then. A forked
    child waits for the end of a pipe. Enter before threads are started.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(writing)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # they are sent to the whole process group
                signal.signal(number, signal.SIG_IGN)
            told = os.read(reading, 1)
            if told in (b"", AT_ONCE):
                os.write(2, words.encode() if told == b"" else STOPPED_AT_ONCE)
        finally:
            os._exit(0)
    os.close(reading)
    STOP.last_words = writing
    try:
        yield
    finally:
        STOP.last_words = None
        with suppress(BrokenPipeError):  # the child is gone: there is nobody to be told
            os.write(writing, b".")
        os.close(writing)
        os.waitpid(child, 0)
