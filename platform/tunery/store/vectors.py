"""Vectors of rows in tables: a column of fixed-size lists of float16, from arrays and back. Pure.

float16 halves what float32 takes and keeps 11 bits of each component: the cosine of two vectors of length 1 moves by
some 1e-4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Float16Array = NDArray[np.float16]


def vector_column(vectors_nh: Float16Array) -> Any:
    """The Arrow array of (rows, dimensions); a row without a vector is all NaN."""
    values = np.ascontiguousarray(vectors_nh, dtype=np.float16).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(values), vectors_nh.shape[1])


def is_vectors(kind: Any) -> bool:
    """Of an Arrow type."""
    return bool(pa.types.is_fixed_size_list(kind))


def vectors_of(column: Any) -> Float16Array:
    """(rows, dimensions) of a table's column."""
    width = column.type.list_size
    pieces = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks if len(chunk)]
    flat = np.concatenate(pieces) if pieces else np.empty(0, np.float16)
    return flat.reshape(-1, width)


def row_bytes(schema: pa.Schema) -> int:
    """Of a row's vectors in a table of this schema."""
    kinds: list[Any] = [kind for kind in schema.types if is_vectors(kind)]
    return sum(2 * kind.list_size for kind in kinds)
