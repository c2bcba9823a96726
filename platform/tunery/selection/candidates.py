"""What diversity chooses among: rows and their vectors, in files of this machine that are mapped, not read.

Vectors are rounded to whole numbers, of length SCALE: then every product and every sum of a comparison is a whole
number below 2**24, which float32 holds exactly. So distances come out the same in whatever order a machine adds them
up, whatever the number of threads, the library and the shape of the products: the same rows are chosen, to the byte.
What rounding moves is about what float16 had moved already: 2e-4 of a cosine.

Disk: 2 bytes a dimension and 28 a row; 100 M rows of 256 dimensions are 54 GB, in memory only as far as the system
caches files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tunery.ingest.corruption_metrics import Bools, Floats
from tunery.store.vectors import Float16Array

FloatMatrix = NDArray[np.float32]
"""Whole numbers, exact."""
Places = NDArray[np.int64]
"""Numbers of candidates, in the order of the rows."""

SCALE = 2000
MOST_DIMENSIONS = 9000
"""Rounding makes a vector at most sqrt(dimensions) / 2 longer, and 2,048 squared is 2**22: of that a squared distance
is at most four times as much."""
BLOCK = 4096
"""Rows that are compared at a time."""


class Candidates:
    """Added a shard at a time, then, once closed, looked at."""

    def __init__(self, folder: Path, dimensions: int) -> None:
        assert dimensions <= MOST_DIMENSIONS, "no model has so many"
        self._folder, self.dimensions, self.count = folder, dimensions, 0
        self._kinds: dict[str, Any] = {
            "vectors": np.dtype((np.int16, (dimensions,))),
            "squares": np.dtype(np.float32),
            "ids": np.dtype(np.uint64),
            "chance": np.dtype(np.float64),
            "badness": np.dtype(np.float64),
        }
        self._open = {name: (folder / name).open("wb") for name in self._kinds}

    def add(self, vectors_nh: NDArray[np.int16], ids: NDArray[np.uint64], chance: Floats, badness: Floats) -> None:
        """`vectors_nh` as `rounded` gives them; `chance` is what a random choice goes by."""
        whole = vectors_nh.astype(np.float32)
        squares = np.einsum("nh,nh->n", whole, whole)
        columns = {"vectors": vectors_nh, "squares": squares, "ids": ids, "chance": chance, "badness": badness}
        for name, values in columns.items():
            self._open[name].write(np.ascontiguousarray(values).tobytes())
        self.count += len(ids)

    def close(self) -> None:
        """Nothing is added any more."""
        for file in self._open.values():
            file.close()
        self._vectors, self.squares, self.ids, self.chance, self.badness = map(self._mapped, self._kinds)

    def _mapped(self, name: str) -> Any:
        if not self.count:  # an empty file can't be mapped
            return np.empty(0, self._kinds[name])
        kind = self._kinds[name]
        return np.memmap(self._folder / name, kind.base, "r", shape=(self.count, *kind.shape))

    def column(self, name: str, kind: type, fill: float) -> Any:
        """A new column on disk, all `fill`."""
        column: Any = np.memmap(self._folder / name, kind, "w+", shape=(max(self.count, 1),))[: self.count]
        for start in range(0, self.count, 1 << 20):
            column[start : start + (1 << 20)] = fill
        return column

    def vectors(self, places: Places | slice) -> FloatMatrix:
        found: FloatMatrix = self._vectors[places].astype(np.float32)
        return found

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.count, BLOCK):
            yield slice(start, min(start + BLOCK, self.count))

    def every(self, most: int) -> Places:
        """At most so many candidates, evenly spaced over all."""
        count = min(most, self.count)
        return np.arange(count, dtype=np.int64) * self.count // max(count, 1)

    def nearest(self, places: Places | slice, others: Sequence[int] | Places) -> tuple[Floats, Places]:
        """The highest cosine of each of `places` to one of `others`, and which of these it is: the first of equals."""
        mine_mh, lengths_m = self.vectors(places), np.sqrt(self.squares[places].astype(np.float64))
        most, where = np.full(len(mine_mh), -np.inf), np.zeros(len(mine_mh), np.int64)
        theirs = np.asarray(others, np.int64)
        for start in range(0, len(theirs), BLOCK):
            piece = theirs[start : start + BLOCK]
            lengths_k = np.sqrt(self.squares[piece].astype(np.float64))
            cosines_mk = (mine_mh @ self.vectors(piece).T) / lengths_k
            at = cosines_mk.argmax(axis=1)
            found = cosines_mk[np.arange(len(at)), at] / lengths_m
            better = found > most
            most[better], where[better] = found[better], start + at[better]
        return most, where


def rounded(vectors_nh: Float16Array) -> tuple[NDArray[np.int16], Bools]:
    """Vectors of length SCALE in whole numbers, and which rows have one: not those of NaN or of length 0."""
    doubles = vectors_nh.astype(np.float64)
    # Squares of float16 are exact in float64, and so is their sum: the length is the same on every machine.
    lengths = np.sqrt(np.einsum("nh,nh->n", doubles, doubles))
    there: Bools = np.isfinite(lengths) & (lengths > 0)
    found = np.rint(doubles[there] * (SCALE / lengths[there])[:, None])
    return found.astype(np.int16), there
