"""Order statistics of a column too long to hold: passes over it, a piece at a time, in constant memory. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tunery.ingest.corruption_metrics import Floats

Pieces = Callable[[], Iterator[Floats]]
"""The column again from its start, each time it is called."""
_DIGIT = 16


def kth_smallest(pieces: Pieces, k: int) -> float:
    """The k-th smallest value (0-based) of the column; exact. NaN counts as larger than everything.

    Radix selection: doubles are mapped to integers of the same order, and four passes fix 16 bits each. Memory: a table
    of 65,536 counts, whatever the length. Raises IndexError when there are not so many values.
    """
    fixed, prefix = 0, np.uint64(0)
    while fixed < 64:
        counts = np.zeros(1 << _DIGIT, dtype=np.int64)
        shift = np.uint64(64 - fixed - _DIGIT)
        for piece in pieces():
            keys = sortable(piece)
            if fixed:
                keys = keys[keys >> np.uint64(64 - fixed) == prefix]
            digits = (keys >> shift) & np.uint64((1 << _DIGIT) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << _DIGIT)
        before = np.cumsum(counts)
        if k >= before[-1]:
            raise IndexError(f"{k} of {before[-1]} values")
        digit = int(np.searchsorted(before, k, side="right"))
        k -= int(before[digit] - counts[digit])
        prefix = (prefix << np.uint64(_DIGIT)) | np.uint64(digit)
        fixed += _DIGIT
    return float(_unsortable(prefix))


def sortable(values: Floats) -> np.ndarray:
    """uint64 keys in the order of the doubles; -0.0 is 0.0, and every NaN is the largest key."""
    clean = np.where(np.isnan(values), np.nan, values + 0.0)
    bits = np.ascontiguousarray(clean, dtype=np.float64).view(np.uint64)
    sign = np.uint64(1 << 63)
    keys = np.where(bits & sign, ~bits, bits | sign)
    return np.where(np.isnan(values), np.uint64(2**64 - 1), keys)


def _unsortable(key: np.uint64) -> np.float64:
    if key == np.uint64(2**64 - 1):
        return np.float64("nan")
    sign = np.uint64(1 << 63)
    bits = key & ~sign if key & sign else ~key
    value: np.float64 = np.array([bits], np.uint64).view(np.float64)[0]
    return value
