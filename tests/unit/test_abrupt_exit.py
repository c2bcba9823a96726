"""The message that is printed when the process exits without reporting an end itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

CODE = """
import os, sys
from tunery.interrupt import report_abrupt_exit
with report_abrupt_exit("exited abruptly"):
    exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("exit_code", "has_message"),
    [
        ("os.kill(os.getpid(), 9)", True),
        ("os._exit(1)", True),
        ("pass", False),
        ("sys.exit(3)", False),
        ("raise KeyboardInterrupt", False),
    ],
)
def test_message_is_printed_only_after_an_abrupt_exit(exit_code: str, has_message: bool) -> None:
    process = subprocess.run([sys.executable, "-c", CODE, exit_code], capture_output=True, text=True, timeout=20)
    assert ("exited abruptly" in process.stderr) == has_message


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_process_group_prints_no_message(number: signal.Signals) -> None:
    """The scheduler of a cluster and Ctrl-C in a terminal signal every process of the group, including the fork."""
    # Including SIGINT, which a shell ignores in background processes.
    handlers = "\n".join(f"signal.signal({signal_number}, signal.default_int_handler)" for signal_number in (2, 15))
    code = CODE.replace("import os, sys", f"import os, signal, sys, time\n{handlers}")
    run = subprocess.Popen(
        [sys.executable, "-c", code, "print(1, flush=True); time.sleep(20)"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert run.stdout is not None
    assert run.stdout.readline() == "1\n"
    os.killpg(run.pid, number)
    _, stderr = run.communicate(timeout=20)
    assert "KeyboardInterrupt" in stderr
    assert "BrokenPipeError" not in stderr
    assert "exited abruptly" not in stderr
