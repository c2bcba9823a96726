"""SIGINT and SIGTERM: a stop request takes effect in any case, and does not interrupt the end of a run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import tunery
from tunery.interrupt import BackgroundCall, StopSignals, interruptible

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(tunery.__file__).parents[1])}
BEGIN = """
import ctypes, os, signal, sys, threading, time
from tunery import interrupt
from tunery.interrupt import STOP, interruptible
interrupt.REPEAT_SECONDS = 0.2
interrupt.SAME_SIGNAL_SECONDS = 0.1
def kill(number=signal.SIGTERM):
    os.kill(os.getpid(), number)
    time.sleep(0.15)
"""


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BEGIN + code]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=30, check=False)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_dropped_by_a_destructor_is_raised_again(number: signal.Signals) -> None:
    """Python drops exceptions of destructors, so Ctrl-C would have no effect."""
    code = f"""
class RaisesInDestructor:
    def __del__(self):
        kill({int(number)})
with STOP.handled():
    try:
        RaisesInDestructor()
        print("dropped")
        time.sleep(10)
    except KeyboardInterrupt:
        print("raised again")
"""
    process = python(code)
    assert process.stdout.split("\n")[:2] == ["dropped", "raised again"], process.stderr


def test_dropped_interrupt_is_raised_by_the_next_check() -> None:
    code = """
interrupt.REPEAT_SECONDS = 60
with STOP.handled():
    try:
        kill()
    except KeyboardInterrupt:
        pass  # like `except BaseException` in a library
    try:
        STOP.check()
    except KeyboardInterrupt:
        print("raised again")
"""
    assert python(code).stdout == "raised again\n"


def test_sigint_that_the_shell_ignores_is_handled() -> None:
    """Otherwise `kill -INT` would have no effect on a run that a script started in the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code = """
assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
with STOP.handled():
    try:
        kill(signal.SIGINT)
        print("ignored")
    except KeyboardInterrupt:
        print("stopped")
"""
        assert python(code).stdout == "stopped\n"
    finally:
        signal.signal(signal.SIGINT, before)


def test_handler_replaced_by_c_code_is_restored_during_a_background_call() -> None:
    """Ray's C++ code replaces the handler in ray.init and ray.shutdown, in another thread."""
    code = """
def replace():
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(15, None)
    time.sleep(0.5)
    os.kill(os.getpid(), 15)
    time.sleep(10)
with STOP.handled():
    try:
        interruptible(replace)
    except KeyboardInterrupt:
        print("stopped")
"""
    assert python(code).stdout == "stopped\n"


def test_held_signals_are_counted_and_do_not_interrupt() -> None:
    code = """
with STOP.handled(), STOP.held():
    kill()
    print(STOP.requested, STOP.hurried, flush=True)
    kill(signal.SIGINT)
    print(STOP.requested, STOP.hurried, flush=True)
    kill()
    print("not reached", flush=True)
"""
    process = python(code)
    assert process.stdout.splitlines() == ["True False", "True True"], "the third signal exits the process"
    assert process.returncode == 130


def test_third_signal_exits_with_one_message() -> None:
    code = """
from tunery.interrupt import report_abrupt_exit
with STOP.handled(), report_abrupt_exit("the run was killed"), STOP.held():
    for _ in range(3):
        kill()
"""
    process = python(code)
    assert process.returncode == 130
    assert "stopped immediately" in process.stderr
    assert "killed" not in process.stderr


def test_signals_in_quick_succession_count_as_one() -> None:
    code = """
interrupt.SAME_SIGNAL_SECONDS = 60
with STOP.handled(), STOP.held():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        kill(number)
    print(STOP.requested, STOP.hurried)
"""
    assert python(code).stdout == "True False\n"


def test_held_signal_is_raised_when_released() -> None:
    code = """
with STOP.handled(), STOP.held():
    kill()
    print("held")
    try:
        with STOP.released():
            print("not reached")
    except KeyboardInterrupt:
        print("stopped")
    kill()
    print("held again")
"""
    assert python(code).stdout.splitlines() == ["held", "stopped", "held again"]


def test_previous_handlers_are_restored() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    stop = StopSignals()
    with stop.handled(), stop.handled():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGALRM) != before[2]
    assert [signal.getsignal(number) for number in numbers] == before


def test_handlers_are_not_installed_in_other_threads() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignals()
    handlers = []

    def run() -> None:
        with stop.handled():
            handlers.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert handlers == [before]


def test_background_call_returns_or_raises() -> None:
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_wait_for_a_background_call_has_a_timeout() -> None:
    release = threading.Event()
    call = BackgroundCall(release.wait)
    assert not call.wait(0.05, 0.01)
    assert call in BackgroundCall.unfinished
    release.set()
    assert call.wait(5, 0.01)
    assert call not in BackgroundCall.unfinished


def test_thread_of_a_background_call_is_kept_alive_until_released() -> None:
    """Ray's processes die with the thread that started them."""
    release = threading.Event()
    call = BackgroundCall(threading.current_thread, release)
    assert call.wait(5)
    thread = call.result()
    time.sleep(0.05)
    assert thread.is_alive()
    release.set()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_command_exits_with_130(number: signal.Signals) -> None:
    """typer converts KeyboardInterrupt to an exit code, which it returns without standalone mode."""
    code = f"""
from tunery import cli
def validate(*arguments):
    kill({int(number)})
cli._load_and_validate = validate
sys.argv = ["tunery", "validate", "x.yaml"]
cli.main()
"""
    process = python(code)
    assert (process.returncode, process.stderr) == (130, "stopped\n")


def test_signal_at_exit_does_not_change_the_exit_code() -> None:
    code = """
import atexit
from tunery import cli
cli._load_and_validate = lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device", "/x"))
sys.argv = ["tunery", "validate", "x.yaml"]
class SignalsAtExit:
    def __del__(self):
        os.kill(os.getpid(), 15)
at_exit = SignalsAtExit()
cli.main()
"""
    process = python(code)
    assert process.returncode == 1
    assert process.stderr.startswith("error: /x: No space left on device\nremedy: free some space")
