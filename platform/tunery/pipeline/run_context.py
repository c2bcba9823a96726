"""Store, run folder and experiment file of a run."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from tunery.store import DEFAULT_STORE, Store


@dataclass(frozen=True)
class RunContext:
    """Store, run folder and experiment file of a run; shared by the stages of the file and those of its trials."""

    store: Store
    run: Path
    """Folder of the run."""
    file: Path
    """The experiment file."""

    @property
    def folder(self) -> Path:
        """Directory that relative paths in the experiment file refer to."""
        return self.file.parent

    def command(self, verb: str, *words: str) -> str:
        """Return the `tunery` command line for this experiment and store, for the remedy of an error."""
        default = self.store.root == DEFAULT_STORE.absolute()
        store = () if default else ("--store", str(self.store.root))
        return shlex.join(("tunery", verb, str(self.file), *words, *store))

    @property
    def events(self) -> Path:
        return self.run / "events"

    @property
    def logs(self) -> Path:
        return self.run / "logs"
