"""Which split a group belongs to, from its name alone.

A split drawn with a random generator changes when a row is added, and puts rows of one origin on both sides.
This one depends on the group's name and on nothing else: not on the other rows, their order or number, nor on
a seed.
"""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "validation", "test"]

MAX_EVAL_FRACTION = 0.45
"""Validation and test take a share each, so that at least a tenth is left to train on."""

# Rows may come ordered by a plain hash of their group; by the same hash the first n would share a split.
_SALT = b"split\0"


def split_of(group: str, eval_fraction: float) -> Split:
    """The split of a group, where validation and test each get the share `eval_fraction` of the groups.

    A larger eval_fraction moves groups out of train only: never back into it, nor between validation and test.
    Raises ValueError unless eval_fraction is in [0, 0.45].
    """
    if not 0 <= eval_fraction <= MAX_EVAL_FRACTION:
        raise ValueError(
            f"eval_fraction is {eval_fraction}: it is the share of validation and again of test, "
            f"so choose it between 0 and {MAX_EVAL_FRACTION} (0.05 is common)."
        )
    # 53 bits, so that the quotient is exact and below 1.
    place = (int.from_bytes(hashlib.sha256(_SALT + group.encode()).digest()[:8], "big") >> 11) / 2**53
    if place < eval_fraction:
        return "test"
    if 1 - place <= eval_fraction:
        return "validation"
    return "train"
