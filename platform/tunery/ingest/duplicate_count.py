"""Counting rows whose content was there before, exactly, in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tunery.store.score_cache import Ids

IN_MEMORY = 1 << 20
"""Ids held before they are written out: 8 MB."""


class DuplicateCount:
    """Takes the ids of rows and counts those that came before. Beyond IN_MEMORY they lie in 256 files by their first
    byte, each of which is counted alone: 100 million ids are 800 MB on disk and 3 MB at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: list[Ids] = []
        self._held = 0

    def add(self, ids: Ids) -> None:
        self._pending.append(ids)
        self._held += len(ids)
        if self._held >= IN_MEMORY:
            self._write_out()

    def _write_out(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        ids = np.sort(np.concatenate([np.empty(0, np.uint64), *self._pending]))
        ends = np.searchsorted(ids, np.arange(1, 256, dtype=np.uint64) << np.uint64(56))
        for first_byte, part in enumerate(np.split(ids, ends)):
            with (self._folder / f"{first_byte:02x}").open("ab") as file:
                file.write(part.tobytes())
        self._pending, self._held = [], 0

    def total(self) -> int:
        """Rows less distinct ids. Removes what was written out."""
        if not self._folder.exists():
            return self._held - len(np.unique(np.concatenate([np.empty(0, np.uint64), *self._pending])))
        self._write_out()
        count = 0
        for path in sorted(self._folder.iterdir()):
            ids = np.fromfile(path, dtype=np.uint64)
            count += len(ids) - len(np.unique(ids))
            path.unlink()
        self._folder.rmdir()
        return count
