"""Pickle functions and errors for other processes, by Ray's cloudpickle, which also pickles functions of scripts."""

from __future__ import annotations

import traceback
from typing import Any


def dumps(value: Any) -> bytes:
    """Pickle a value."""
    from ray import cloudpickle

    pickled: bytes = cloudpickle.dumps(value)
    return pickled


def loads(pickled: bytes) -> Any:
    """Unpickle what `dumps` returned."""
    from ray import cloudpickle

    return cloudpickle.loads(pickled)


def dump_error(error: Exception) -> bytes:
    """Pickle an error. Its traceback is added as a note, since pickling drops it."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        return dumps(error)
    except Exception:  # libraries raise errors with attributes that cannot be pickled
        return dumps(RuntimeError("".join(traceback.format_exception_only(error)).strip()))
