"""Counting rows whose content was there before, exactly, in bounded memory."""

from __future__ import annotations

from array import array
from pathlib import Path

import numpy as np

IN_MEMORY = 1 << 20
"""Ids held before they are written out: 8 MB."""


class DuplicateCount:
    """Takes the ids of rows (16 hex digits) and counts those that came before. Beyond IN_MEMORY they lie in 256 files
    by their first byte, each of which is counted alone: 100 million ids are 800 MB on disk and 3 MB at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending = array("Q")

    def add(self, row_id: str) -> None:
        self._pending.append(int(row_id, 16))
        if len(self._pending) == IN_MEMORY:
            self._write_out()

    def _write_out(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        ids = np.sort(np.array(self._pending, dtype=np.uint64))
        ends = np.searchsorted(ids, np.arange(1, 256, dtype=np.uint64) << np.uint64(56))
        for first_byte, part in enumerate(np.split(ids, ends)):
            with (self._folder / f"{first_byte:02x}").open("ab") as file:
                file.write(part.tobytes())
        del self._pending[:]

    def total(self) -> int:
        """Rows less distinct ids. Removes what was written out."""
        if not self._folder.exists():
            return len(self._pending) - len(np.unique(np.array(self._pending, dtype=np.uint64)))
        self._write_out()
        count = 0
        for path in sorted(self._folder.iterdir()):
            ids = np.fromfile(path, dtype=np.uint64)
            count += len(ids) - len(np.unique(ids))
            path.unlink()
        self._folder.rmdir()
        return count
