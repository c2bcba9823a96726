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
        print("library output on stdout")
        print("library output on stderr", file=sys.stderr)
"""


def test_printed_lines_are_redirected_to_the_log(tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3] / "platform")},
        check=False,
    )
    os.close(terminal)
    output = os.read(controller, 100_000).decode()
    assert process.returncode == 0, output
    assert "quiet" in output
    assert "library output" not in output
    assert (tmp_path / "driver.log").read_text().count("library output") == 2
