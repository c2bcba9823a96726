"""Candidates for diversity selection: row vectors and per-row values in memory-mapped local files.

Vectors have length SCALE and are rounded to whole numbers. Every product and every sum in a comparison is then a whole
number below 2**24, which float32 represents exactly. Distances therefore do not depend on the order of summation, the
number of threads, the library or the shape of the products, and the same rows are selected on every machine.
Rounding changes a cosine by about 2e-4, as much as the float16 embeddings already do.

Disk: 2 bytes per dimension and 28 bytes per row; 100 M rows of 256 dimensions take 54 GB. They are in memory only as
far as the operating system caches files.
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
"""Whole numbers stored as float32."""
Indices = NDArray[np.int64]
"""Indices of candidates, in row order."""

SCALE = 2000
MAX_DIMENSIONS = 9000
"""Rounding lengthens a vector by at most sqrt(dimensions) / 2. Up to 9,000 dimensions the length is below 2,048, its
square below 2**22, and a squared distance at most four times that."""
BLOCK_SIZE = 4096
"""Number of rows per comparison."""


class Candidates:
    """Call `add` for each shard, then `close`, then read."""

    def __init__(self, folder: Path, dimensions: int) -> None:
        assert dimensions <= MAX_DIMENSIONS, "no embedding model has more dimensions"
        self._folder, self.dimensions, self.count = folder, dimensions, 0
        self._dtypes: dict[str, Any] = {
            "vectors": np.dtype((np.int16, (dimensions,))),
            "squares": np.dtype(np.float32),
            "ids": np.dtype(np.uint64),
            "chance": np.dtype(np.float64),
            "badness": np.dtype(np.float64),
        }
        self._files = {name: (folder / name).open("wb") for name in self._dtypes}

    def add(self, vectors_nh: NDArray[np.int16], ids: NDArray[np.uint64], chance: Floats, badness: Floats) -> None:
        """Append rows. `vectors_nh` comes from `round_vectors`; `chance` orders the rows of a random selection."""
        floats_nh = vectors_nh.astype(np.float32)
        squares = np.einsum("nh,nh->n", floats_nh, floats_nh)
        columns = {"vectors": vectors_nh, "squares": squares, "ids": ids, "chance": chance, "badness": badness}
        for name, values in columns.items():
            self._files[name].write(np.ascontiguousarray(values).tobytes())
        self.count += len(ids)

    def close(self) -> None:
        """Finish writing and map the files for reading."""
        for file in self._files.values():
            file.close()
        self._vectors, self.squares, self.ids, self.chance, self.badness = map(self._map_file, self._dtypes)

    def _map_file(self, name: str) -> Any:
        if not self.count:  # an empty file can't be mapped
            return np.empty(0, self._dtypes[name])
        dtype = self._dtypes[name]
        return np.memmap(self._folder / name, dtype.base, "r", shape=(self.count, *dtype.shape))

    def column(self, name: str, dtype: type, fill: float) -> Any:
        """Create a memory-mapped column, every value set to `fill`."""
        column: Any = np.memmap(self._folder / name, dtype, "w+", shape=(max(self.count, 1),))[: self.count]
        for start in range(0, self.count, 1 << 20):
            column[start : start + (1 << 20)] = fill
        return column

    def vectors(self, indices: Indices | slice) -> FloatMatrix:
        vectors: FloatMatrix = self._vectors[indices].astype(np.float32)
        return vectors

    def blocks(self) -> Iterator[slice]:
        for start in range(0, self.count, BLOCK_SIZE):
            yield slice(start, min(start + BLOCK_SIZE, self.count))

    def strided_sample(self, max_size: int) -> Indices:
        """Return at most `max_size` evenly spaced candidate indices."""
        size = min(max_size, self.count)
        return np.arange(size, dtype=np.int64) * self.count // max(size, 1)

    def nearest(self, indices: Indices | slice, others: Sequence[int] | Indices) -> tuple[Floats, Indices]:
        """Return for each row of `indices` its highest cosine to a row of `others`, and the position in `others` of
        that row (the first one in a tie). The cosine is -inf if `others` is empty."""
        rows_mh, lengths_m = self.vectors(indices), np.sqrt(self.squares[indices].astype(np.float64))
        max_cosines, positions = np.full(len(rows_mh), -np.inf), np.zeros(len(rows_mh), np.int64)
        other_indices = np.asarray(others, np.int64)
        for start in range(0, len(other_indices), BLOCK_SIZE):
            chunk = other_indices[start : start + BLOCK_SIZE]
            lengths_k = np.sqrt(self.squares[chunk].astype(np.float64))
            cosines_mk = (rows_mh @ self.vectors(chunk).T) / lengths_k
            chunk_positions = cosines_mk.argmax(axis=1)
            cosines = cosines_mk[np.arange(len(chunk_positions)), chunk_positions] / lengths_m
            closer = cosines > max_cosines
            max_cosines[closer], positions[closer] = cosines[closer], start + chunk_positions[closer]
        return max_cosines, positions


def round_vectors(vectors_nh: Float16Array) -> tuple[NDArray[np.int16], Bools]:
    """Scale vectors to length SCALE and round them to whole numbers.

    Return the rounded vectors and a mask of the rows that have one. Rows with NaN or length 0 have none.
    """
    doubles = vectors_nh.astype(np.float64)
    # Squares of float16 are exact in float64, and so is their sum: the length is the same on every machine.
    lengths = np.sqrt(np.einsum("nh,nh->n", doubles, doubles))
    valid: Bools = np.isfinite(lengths) & (lengths > 0)
    scaled = np.rint(doubles[valid] * (SCALE / lengths[valid])[:, None])
    return scaled.astype(np.int16), valid
