"""Exact order statistics of a column that does not fit in memory, in several passes and constant memory. Pure
functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from tunery.ingest.corruption_metrics import Floats

Chunks = Callable[[], Iterator[Floats]]
"""Returns a new iterator over the chunks of the column at each call."""
_DIGIT_BITS = 16


def kth_smallest(chunks: Chunks, k: int) -> float:
    """Return the exact k-th smallest value (0-based) of the column. NaN is larger than every number.

    Radix selection: doubles are mapped to integers with the same order, and each of four passes determines 16 bits.
    Memory: a table of 65,536 counts, whatever the length. Raises IndexError if the column has at most `k` values.
    """
    fixed_bits, prefix = 0, np.uint64(0)
    while fixed_bits < 64:
        counts = np.zeros(1 << _DIGIT_BITS, dtype=np.int64)
        shift = np.uint64(64 - fixed_bits - _DIGIT_BITS)
        for chunk in chunks():
            keys = _sort_keys(chunk)
            if fixed_bits:
                keys = keys[keys >> np.uint64(64 - fixed_bits) == prefix]
            digits = (keys >> shift) & np.uint64((1 << _DIGIT_BITS) - 1)
            counts += np.bincount(digits.astype(np.int64), minlength=1 << _DIGIT_BITS)
        cumulative = np.cumsum(counts)
        if k >= cumulative[-1]:
            raise IndexError(f"{k} of {cumulative[-1]} values")
        digit = int(np.searchsorted(cumulative, k, side="right"))
        k -= int(cumulative[digit] - counts[digit])
        prefix = (prefix << np.uint64(_DIGIT_BITS)) | np.uint64(digit)
        fixed_bits += _DIGIT_BITS
    return float(_from_sort_key(prefix))


def _sort_keys(values: Floats) -> np.ndarray:
    """Return uint64 keys in the order of the doubles; -0.0 maps to 0.0, and every NaN to the largest key."""
    clean = np.where(np.isnan(values), np.nan, values + 0.0)
    bits = np.ascontiguousarray(clean, dtype=np.float64).view(np.uint64)
    sign = np.uint64(1 << 63)
    keys = np.where(bits & sign, ~bits, bits | sign)
    return np.where(np.isnan(values), np.uint64(2**64 - 1), keys)


def _from_sort_key(key: np.uint64) -> np.float64:
    if key == np.uint64(2**64 - 1):
        return np.float64("nan")
    sign = np.uint64(1 << 63)
    bits = key & ~sign if key & sign else ~key
    value: np.float64 = np.array([bits], np.uint64).view(np.float64)[0]
    return value
