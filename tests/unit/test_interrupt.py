"""SIGINT and SIGTERM: a stop request that cannot be lost, and that does not interrupt the end of a run."""

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
def test_interrupt_that_a_destructor_swallows_is_raised_again(number: signal.Signals) -> None:
    """Python drops what a destructor raises: so a Ctrl-C could be lost, and the run went on to its end."""
    code = f"""
class Swallows:
    def __del__(self):
        kill({int(number)})
with STOP.handled():
    try:
        Swallows()
        print("lost")
        time.sleep(10)
    except KeyboardInterrupt:
        print("raised again")
"""
    done = python(code)
    assert done.stdout.split("\n")[:2] == ["lost", "raised again"], done.stderr


def test_interrupt_that_was_swallowed_is_raised_by_the_next_check() -> None:
    code = """
interrupt.REPEAT_SECONDS = 60
with STOP.handled():
    try:
        kill()
    except KeyboardInterrupt:
        pass  # as a library's `except BaseException` has it
    try:
        STOP.check()
    except KeyboardInterrupt:
        print("raised again")
"""
    assert python(code).stdout == "raised again\n"


def test_sigint_that_the_shell_has_left_ignored_stops_too() -> None:
    """So `kill -INT` of a run that a script has started in the background was without effect."""
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


def test_handler_that_c_code_has_replaced_is_put_back_while_a_call_is_waited_for() -> None:
    """As Ray's C++ code does within ray.init and ray.shutdown, in another thread."""
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


def test_signals_while_a_run_is_closed_interrupt_nothing_and_are_counted() -> None:
    code = """
with STOP.handled(), STOP.held():
    kill()
    print(STOP.requested, STOP.hurried, flush=True)
    kill(signal.SIGINT)
    print(STOP.requested, STOP.hurried, flush=True)
    kill()
    print("not reached", flush=True)
"""
    done = python(code)
    assert done.stdout.splitlines() == ["True False", "True True"], "the third one ends the process"
    assert done.returncode == 130


def test_third_signal_ends_the_process_and_says_so_once() -> None:
    code = """
from tunery.interrupt import report_abrupt_exit
with STOP.handled(), report_abrupt_exit("somebody killed the run"), STOP.held():
    for _ in range(3):
        kill()
"""
    done = python(code)
    assert done.returncode == 130
    assert "stopped at once" in done.stderr
    assert "killed" not in done.stderr


def test_signals_in_quick_succession_are_one() -> None:
    code = """
interrupt.SAME_SIGNAL_SECONDS = 60
with STOP.handled(), STOP.held():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        kill(number)
    print(STOP.requested, STOP.hurried)
"""
    assert python(code).stdout == "True False\n"


def test_signal_before_the_work_is_raised_when_it_begins() -> None:
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


def test_handlers_are_as_before_when_nothing_is_handled_any_more() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
    before = [signal.getsignal(number) for number in numbers]
    stop = StopSignals()
    with stop.handled(), stop.handled():
        assert signal.getsignal(signal.SIGTERM) != before[1]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGALRM) != before[2]
    assert [signal.getsignal(number) for number in numbers] == before


def test_other_threads_leave_signals_to_the_program() -> None:
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignals()
    seen = []

    def run() -> None:
        with stop.handled():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def test_background_call_gives_what_it_returned_or_raised() -> None:
    assert interruptible(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        interruptible(lambda: 1 // 0)


def test_background_call_is_waited_for_at_most_so_long() -> None:
    release = threading.Event()
    call = BackgroundCall(release.wait)
    assert not call.wait(0.05, 0.01)
    assert call in BackgroundCall.unfinished
    release.set()
    assert call.wait(5, 0.01)
    assert call not in BackgroundCall.unfinished


def test_thread_of_a_background_call_lives_as_long_as_wished() -> None:
    """Ray's processes die with the thread that started them."""
    keep = threading.Event()
    call = BackgroundCall(threading.current_thread, keep)
    assert call.wait(5)
    thread = call.result()
    time.sleep(0.05)
    assert thread.is_alive()
    keep.set()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_any_command_that_is_interrupted_ends_with_130(number: signal.Signals) -> None:
    """typer makes an exit code of KeyboardInterrupt, and without its standalone mode returns it: it was 0 then."""
    code = f"""
from tunery import cli
def validate(*arguments):
    kill({int(number)})
cli._checked = validate
sys.argv = ["tunery", "validate", "x.yaml"]
cli.main()
"""
    done = python(code)
    assert (done.returncode, done.stderr) == (130, "stopped\n")


def test_signal_after_the_exit_code_is_settled_changes_nothing() -> None:
    code = """
import atexit
from tunery import cli
cli._checked = lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device", "/x"))
sys.argv = ["tunery", "validate", "x.yaml"]
class Last:
    def __del__(self):
        os.kill(os.getpid(), 15)
keep = Last()
cli.main()
"""
    done = python(code)
    assert done.returncode == 1
    assert done.stderr.startswith("error: /x: No space left on device\nremedy: free some space")
