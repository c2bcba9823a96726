"""Clean stop on SIGINT and SIGTERM, and an error message if the process is killed."""

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
"""An interrupt that Python dropped (raised in a destructor or a callback of C code) is raised again after this time,
which is longer than leases and actor pools take to close."""
SAME_SIGNAL_SECONDS = 1.0
"""Signals within this time count as one: a terminal signals the process group, and wrappers (timeout, npm, a Slurm
step) forward the signal as well."""
SIGNALS_TO_HURRY = 2
"""Number of signals after which closing no longer waits for Ray and W&B."""
SIGNALS_TO_EXIT = 3
"""Number of signals after which the process exits immediately."""
EXIT_CODE = 130
EXIT_NOW = b"!"
EXIT_NOW_MESSAGE = (
    b"\nstopped immediately, without a report; the same command resumes from the last finished stage or checkpoint\n"
)
POLL_SECONDS = 0.2


class StopSignals:
    """Handles SIGINT and SIGTERM of this process: the first signal requests a clean stop.

    Raising KeyboardInterrupt in the handler is not enough: the exception can be dropped, and Ray replaces handlers. So
    the request is stored. `check()` raises it again at every stage boundary and in every wait, and a timer raises it
    again until the run is being closed (`held()`).
    """

    def __init__(self) -> None:
        self._count = 0
        self._last = 0.0
        self._held = False
        self._installed = False
        self._armed = False
        self._alarm_before: Any = None
        self._errors: dict[int, Exception] = {}
        self.exit_pipe: int | None = None
        """File descriptor of the pipe that the child of `report_abrupt_exit` reads."""

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self._count > 0

    @property
    def hurried(self) -> bool:
        """Whether a second signal came, for example because closing takes long."""
        return self._count >= SIGNALS_TO_HURRY

    def check(self) -> None:
        """Raise KeyboardInterrupt if a stop was requested, or the error of `raise_in_thread` for this thread,
        except inside `held()`."""
        if self._count and not self._held:
            raise KeyboardInterrupt
        if self._errors and not self._held and (error := self._errors.pop(threading.get_ident(), None)):
            raise error

    def raise_in_thread(self, thread: int, error: Exception) -> None:
        """Make the next `check` of another thread (its `get_ident()`) raise `error`."""
        self._errors[thread] = error

    def clear_error(self, thread: int) -> None:
        """Forget the error of `raise_in_thread` if it has not been raised."""
        self._errors.pop(thread, None)

    def forget(self) -> None:
        """Clear the request, for commands that continue after Ctrl-C has ended one part of them."""
        self._count = 0
        self._disarm()

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Handle both signals inside the context; nested uses share one state. SIGINT is handled even if the shell
        ignores it, as for background jobs, so that `kill -INT` stops such a run.

        Only the main thread can handle signals: in other threads this does nothing.
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
                if handler is not None:  # None is a handler of C code, which Python cannot restore
                    signal.signal(number, handler)

    def install(self) -> None:
        """Install the handlers again: Ray's C++ code (2.60, RayLog::InstallFailureSignalHandler within
        `ray.init`, RayLog::UninstallSignalAction within `ray.shutdown`) replaces the one of SIGTERM without
        Python noticing. Does nothing outside of `handled()` and outside of the main thread."""
        if self._installed and threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._on_signal)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside the context signals are counted but do not interrupt: for steps that must complete, such as the start
        and the end of a run (report, W&B, Ray)."""
        before, self._held = self._held, True
        self._disarm()
        try:
            yield
        finally:
            self._held = before

    @contextmanager
    def released(self) -> Iterator[None]:
        """Let signals interrupt again inside `held()`. Raises KeyboardInterrupt if a signal came before."""
        before, self._held = self._held, False
        try:
            self.check()
            yield
        finally:
            self._held = before
            self._disarm()

    def _arm(self) -> None:
        """Start the timer at the first signal, not earlier: other code may use it (pytest-timeout does)."""
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
        if self._count >= SIGNALS_TO_EXIT:
            if self.exit_pipe is not None:
                os.write(self.exit_pipe, EXIT_NOW)
            os._exit(EXIT_CODE)
        if not self._held:
            self._arm()
            raise KeyboardInterrupt

    def _on_alarm(self, number: int, frame: FrameType | None) -> None:
        self.check()


STOP = StopSignals()
"""The instance of this process."""


class BackgroundCall(Generic[T]):
    """Runs `call()` in a background thread, which starts immediately.

    In the main thread Ray Train (2.60) installs a SIGINT handler and never removes it, Ray Tune ignores the first
    interrupt, and `ray.init` installs a SIGTERM handler; in other threads they do not touch signals.
    """

    unfinished: ClassVar[set[BackgroundCall[Any]]] = set()

    def __init__(self, call: Callable[[], T], keep: threading.Event | None = None) -> None:
        """With `keep` the thread stays alive after the call until the event is set: Linux sends the parent-death signal
        of a child process (PR_SET_PDEATHSIG) when the thread that started it ends."""
        self._returned: list[T] = []
        self._error: list[BaseException] = []
        # Not Thread.join: if interrupted, it marks a live thread as ended (Python 3.11, _wait_for_tstate_lock).
        self._done = threading.Event()

        def run() -> None:
            try:
                self._returned.append(call())
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
        """Wait up to `seconds` for the call to end and return whether it has. Signals are handled while waiting."""
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

    @property
    def ended(self) -> bool:
        return self._done.is_set()

    def result(self) -> T:
        """Return the result of the ended call, or raise its exception."""
        if self._error:
            raise self._error[0]
        return self._returned[0]


def has_unfinished_calls() -> bool:
    """Whether a background call is still running. The process must then exit with os._exit: during finalization Python
    (3.11) ends a daemon thread that returns from C++ code, and C++ then aborts."""
    return bool(BackgroundCall.unfinished)


def interruptible(call: Callable[[], T]) -> T:
    """Run `call()` in a background thread while the main thread handles signals. After an interrupt the thread keeps
    running until the process exits, or fails once Ray is shut down."""
    background = BackgroundCall(call)
    background.wait()
    return background.result()


@contextmanager
def report_abrupt_exit(message: str) -> Iterator[None]:
    """Write `message` to standard error if this process ends inside the context without leaving it.

    This happens after kill -9, and when Ray's node process (raylet) dies: Ray 2.60 then exits the driver from C++
    (core_worker, QuickExit), where no Python handler runs and standard error is redirected to a log file. A forked
    child waits for the end of a pipe. Enter before threads are started.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(writing)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # these signals go to the whole process group
                signal.signal(number, signal.SIG_IGN)
            received = os.read(reading, 1)
            if received in (b"", EXIT_NOW):
                os.write(2, message.encode() if received == b"" else EXIT_NOW_MESSAGE)
        finally:
            os._exit(0)
    os.close(reading)
    STOP.exit_pipe = writing
    try:
        yield
    finally:
        STOP.exit_pipe = None
        with suppress(BrokenPipeError):  # the child has been killed
            os.write(writing, b".")
        os.close(writing)
        os.waitpid(child, 0)
