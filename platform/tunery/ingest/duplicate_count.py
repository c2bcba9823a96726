"""Exact count of duplicate row ids in bounded memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tunery.store.score_cache import Ids

MAX_PENDING_IDS = 1 << 20
"""Number of ids buffered before they are written to files: 8 MB."""


class DuplicateCount:
    """Counts rows whose id occurred before. More than MAX_PENDING_IDS ids are partitioned into 256 files by their first
    byte, and each file is counted separately: 100 million ids take 800 MB of disk and 3 MB of memory."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: list[Ids] = []
        self._num_pending = 0

    def add(self, ids: Ids) -> None:
        self._pending.append(ids)
        self._num_pending += len(ids)
        if self._num_pending >= MAX_PENDING_IDS:
            self._flush()

    def _flush(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        ids = np.sort(np.concatenate([np.empty(0, np.uint64), *self._pending]))
        ends = np.searchsorted(ids, np.arange(1, 256, dtype=np.uint64) << np.uint64(56))
        for first_byte, part in enumerate(np.split(ids, ends)):
            with (self._folder / f"{first_byte:02x}").open("ab") as file:
                file.write(part.tobytes())
        self._pending, self._num_pending = [], 0

    def total(self) -> int:
        """Return the number of rows minus the number of distinct ids, and remove the files."""
        if not self._folder.exists():
            return self._num_pending - len(np.unique(np.concatenate([np.empty(0, np.uint64), *self._pending])))
        self._flush()
        count = 0
        for path in sorted(self._folder.iterdir()):
            ids = np.fromfile(path, dtype=np.uint64)
            count += len(ids) - len(np.unique(ids))
            path.unlink()
        self._folder.rmdir()
        return count
