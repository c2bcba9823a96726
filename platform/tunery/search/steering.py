"""Wishes about a search that runs, from another command: trials to add, and trials to stop.

    <run>/steering/<time>-<process>.json    {"overrides", "origin", "of"}: a trial to add
    <run>/steering/stop-<trial>             this one is to end

Each is a file of its own, written whole by a rename; the search reads them as they come, and again after a kill: what
was done already stands in its journal.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class SearchControl:
    def __init__(self, run: Path) -> None:
        self._folder = run / "steering"
        self._read: set[str] = set()

    def add(self, overrides: Mapping[str, Any], origin: str = "added", of: str = "") -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns():020d}-{os.getpid()}"
        aside = self._folder / f".{name}"
        aside.write_text(json.dumps({"overrides": dict(overrides), "origin": origin, "of": of}))
        aside.rename(self._folder / f"{name}.json")

    def new(self) -> list[dict[str, Any]]:
        """Trials to add that were wished for since the last call, in their order."""
        found = []
        for path in sorted(self._folder.glob("[0-9]*.json")):
            if path.name not in self._read:
                self._read.add(path.name)
                found.append(json.loads(path.read_text()))
        return found

    def clear(self) -> None:
        """The search has ended: another one of this run shall not take its wishes for its own."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def forget_stops(self) -> None:
        """They were of another search: trials of the same values have the same names."""
        for path in self._folder.glob("stop-*"):
            path.unlink()

    def stop(self, trial: str) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        self.stop_file(trial).touch()

    def stop_file(self, trial: str) -> Path:
        """Is there when somebody wants the trial to end."""
        return self._folder / f"stop-{trial}"

    def stops(self, trial: str) -> bool:
        return self.stop_file(trial).exists()
