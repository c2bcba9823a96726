"""Ends that come from outside: Ctrl-C that reaches us, and a last word when the process is gone at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

T = TypeVar("T")


def interruptible(call: Callable[[], T]) -> T:
    """`call()` in a thread of its own, while the main thread stays open to KeyboardInterrupt.

    Ray Train (2.60) puts its own SIGINT handler in the main thread and never takes it away, and Ray Tune swallows the
    first interrupt; in other threads both leave signals alone. After an interrupt the thread is left behind: it ends
    with the process, or with an error once Ray is shut down.
    """
    outcome: list[T] = []
    error: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as raised:
            error.append(raised)

    thread = threading.Thread(target=run, name="interruptible", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(timeout=0.2)
    if error:
        raise error[0]
    return outcome[0]


@contextmanager
def last_words(words: str) -> Iterator[None]:
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
            if os.read(reading, 1) == b"":
                os.write(2, words.encode())
        finally:
            os._exit(0)
    os.close(reading)
    try:
        yield
    finally:
        with suppress(BrokenPipeError):  # the child is gone: there is nobody to be told
            os.write(writing, b".")
        os.close(writing)
        os.waitpid(child, 0)
