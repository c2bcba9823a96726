"""Commands to a running search from another process: add a trial, stop a trial.

    <run>/steering/<time>-<random>.json     {"overrides", "origin", "of"}: a trial to add
    <run>/steering/stop-<trial>             a request to stop this trial

Each command is a file, written atomically by a rename. The search polls the folder. After a kill it reads the files
again; the journal says which commands it has already applied.
"""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tunery.store.atomic_write import write_json


class SearchControl:
    """Writes and reads the commands of a run."""

    def __init__(self, run: Path) -> None:
        self._folder = run / "steering"
        self._read: set[str] = set()

    def add_trial(self, overrides: Mapping[str, Any], origin: str = "added", of: str = "") -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        write_json(self._folder / f"{name}.json", {"overrides": dict(overrides), "origin": origin, "of": of})

    def new_trials(self) -> list[dict[str, Any]]:
        """Trials to add that were requested since the last call, in order of request."""
        requests = []
        for path in sorted(self._folder.glob("[0-9]*.json")):
            if path.name not in self._read:
                self._read.add(path.name)
                requests.append(json.loads(path.read_text()))
        return requests

    def clear(self) -> None:
        """Delete all commands once the search has ended, so that another search of this run does not apply them."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def clear_stops(self) -> None:
        """Delete the stop requests of an earlier search: trials with the same values have the same names."""
        for path in self._folder.glob("stop-*"):
            path.unlink()

    def request_stop(self, trial: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.stop_file(trial).touch()

    def stop_file(self, trial: str) -> Path:
        """The file exists while a request to stop the trial is pending."""
        return self._folder / f"stop-{trial}"

    def stop_requested(self, trial: str) -> bool:
        return self.stop_file(trial).exists()
