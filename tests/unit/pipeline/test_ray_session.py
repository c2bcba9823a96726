"""Output of libraries goes to the log file instead of the terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
from rich.console import Console
from tunery.pipeline.ray_session import redirect_output
from tunery.events.event_log import EventReader
from tunery.reporting.terminal import Terminal
folder = Path(sys.argv[1])
(folder / "events").mkdir()
with redirect_output(folder / "driver.log") as out:
    with Terminal(Console(file=out, force_terminal=True), "quiet", folder, EventReader(folder / "events")):
        print("chatter on stdout")
        print("chatter on stderr", file=sys.stderr)
"""


def test_printed_lines_are_redirected_to_the_log(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3] / "platform")},
        check=False,
    )
    os.close(theirs)
    displayed = os.read(ours, 100_000).decode()
    assert done.returncode == 0, displayed
    assert "quiet" in displayed
    assert "chatter" not in displayed
    assert (tmp_path / "driver.log").read_text().count("chatter") == 2
