"""What is said when the process is gone before it can say anything."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import os, sys
from tunery.interrupt import last_words
with last_words("gone at once"):
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
