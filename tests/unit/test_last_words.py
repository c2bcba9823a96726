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
with report_abrupt_exit("gone at once"):
    exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ("os.kill(os.getpid(), 9)", True),
        ("os._exit(1)", True),
        ("pass", False),
        ("sys.exit(3)", False),
        ("raise KeyboardInterrupt", False),
    ],
)
def test_last_words_are_for_ends_that_leave_no_other(end: str, said: bool) -> None:
    done = subprocess.run([sys.executable, "-c", CODE, end], capture_output=True, text=True, timeout=20)
    assert ("gone at once" in done.stderr) == said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_whole_group_leaves_the_end_to_the_process(number: signal.Signals) -> None:
    """A cluster's scheduler and a terminal's Ctrl-C signal every process of the group, the forked one too."""
    # SIGINT too: a shell leaves it ignored in what it starts in the background.
    told = "\n".join(f"signal.signal({one}, signal.default_int_handler)" for one in (2, 15))
    code = CODE.replace("import os, sys", f"import os, signal, sys, time\n{told}")
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
    _, err = run.communicate(timeout=20)
    assert "KeyboardInterrupt" in err
    assert "BrokenPipeError" not in err
    assert "gone at once" not in err
