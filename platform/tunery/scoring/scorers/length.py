"""Length of rows in words, characters or lines (https://arxiv.org/abs/2402.04833).

Rows are scored one at a time, so 100 M rows take only CPU hours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunery.scoring.scorers.interfaces import Columns
from tunery.scoring.scorers.texts import lines, select_text, words
from tunery.spec import Length
from tunery.store.rows import Row


class LengthScorer:
    def __init__(self, spec: Length, inputs: Mapping[str, Path]) -> None:
        self._of, self._unit = spec.of, spec.length

    def __call__(self, rows: Sequence[Row]) -> Columns:
        """Return "score", the length of the selected part (NaN if the row has no such part, such as the response of
        a prompt), and "prompt", the length of the user messages (NaN for plain texts)."""
        return {
            "score": [self._measure(select_text(row, self._of)) for row in rows],
            "prompt": [self._measure(select_text(row, "prompt")) for row in rows],
        }

    def _measure(self, text: str | None) -> float:
        if text is None:
            return math.nan
        if self._unit == "chars":
            return float(len(text))
        return float(len(words(text) if self._unit == "words" else lines(text)))
