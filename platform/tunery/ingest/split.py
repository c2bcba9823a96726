"""Assignment of groups to splits by a hash of the group.

A random split changes when a row is added, and separates rows of the same origin. This split depends only on the name
of the group, not on other rows, their order or number, or a seed.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test"]

MAX_EVAL_FRACTION = 0.45
"""Validation and test each take this fraction, so that at least a tenth is left for training."""

# Rows may be sorted by a plain hash of their group. With the same hash, the first n rows would all be in one split.
_SALT = b"split\0"


def split_of(group: str, eval_fraction: float) -> Split:
    """Return the split of a group; validation and test each get the fraction `eval_fraction` of the groups.

    Increasing eval_fraction only moves groups out of train, never into it or between validation and test.
    Raises ValueError unless eval_fraction is in [0, 0.45].
    """
    if not 0 <= eval_fraction <= MAX_EVAL_FRACTION:
        raise ValueError(
            f"eval_fraction is {eval_fraction}: it is the share of validation and again of test, "
            f"so choose it between 0 and {MAX_EVAL_FRACTION} (0.05 is common)."
        )
    # 53 bits, so that the quotient is exact and below 1.
    position = (int.from_bytes(hashlib.sha256(_SALT + group.encode()).digest()[:8], "big") >> 11) / 2**53
    if position < eval_fraction:
        return "test"
    if 1 - position <= eval_fraction:
        return "validation"
    return "train"
