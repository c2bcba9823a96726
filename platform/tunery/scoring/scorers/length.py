"""How long rows are: words, characters or lines (https://arxiv.org/abs/2402.04833).

A row at a time, so 100 M rows are a matter of hours of CPU alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from tunery.scoring.scorers.registry import Columns
from tunery.scoring.scorers.texts import lines, select_text, words
from tunery.spec import Length
from tunery.store.rows import Row


class LengthScorer:
    def __init__(self, spec: Length, inputs: Mapping[str, Path]) -> None:
        self._of, self._unit = spec.of, spec.length

    def __call__(self, rows: Sequence[Row]) -> Columns:
        """score: of the part that is asked for, 0 where it is empty, NaN where there is none (the answer of a prompt);
        question: of the user's turns, NaN in texts."""
        return {
            "score": [self._measure(select_text(row, self._of)) for row in rows],
            "question": [self._measure(select_text(row, "question")) for row in rows],
        }

    def _measure(self, text: str | None) -> float:
        if text is None:
            return math.nan
        if self._unit == "chars":
            return float(len(text))
        return float(len(words(text) if self._unit == "words" else lines(text)))
