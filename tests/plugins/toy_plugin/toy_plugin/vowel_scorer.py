"""Vowels among the letters of a response."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from toy_plugin import Vowels
from tunery.scoring.scorers.interfaces import Columns
from tunery.store.rows import Row


class VowelScorer:
    def __init__(self, spec: Vowels, inputs: Mapping[str, Path]) -> None:
        self._counts = spec.vowels == "count"

    def __call__(self, rows: Sequence[Row]) -> Columns:
        """Return "score" (NaN for a row without letters) and "letters"."""
        letters = [[char for char in _response(row).lower() if char.isalpha()] for row in rows]
        vowels = [sum(char in "aeiou" for char in found) for found in letters]
        shares = [count / len(found) if found else math.nan for count, found in zip(vowels, letters, strict=True)]
        return {
            "score": [float(count) for count in vowels] if self._counts else shares,
            "letters": [len(found) for found in letters],
        }


def _response(row: Row) -> str:
    return row["text"] or row["messages"][-1]["content"] or ""
