"""Ctrl-C that reaches us, whatever a library does with signals."""

from __future__ import annotations

import threading
from collections.abc import Callable
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
