"""Pickle functions and errors for other processes, functions of scripts included (cloudpickle, as Ray does)."""

from __future__ import annotations

import traceback
from typing import Any


def dumps(value: Any) -> bytes:
    from ray import cloudpickle

    pickled: bytes = cloudpickle.dumps(value)
    return pickled


def loads(pickled: bytes) -> Any:
    from ray import cloudpickle

    return cloudpickle.loads(pickled)


def dump_error(error: Exception) -> bytes:
    """Pickle an error with its traceback as a note, since pickling loses the traceback."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        return dumps(error)
    except Exception:  # an error of a library with attributes that cannot be pickled
        return dumps(RuntimeError("".join(traceback.format_exception_only(error)).strip()))
