"""Overlap with evaluation sets: n-grams of a row that occur there too (Brown et al. 2020, appendix C,
https://arxiv.org/abs/2005.14165).

Words are compared without case and punctuation, as there. The paper's n (8 to 13) is below the length of nearly all its
examples; rows of questions and answers are often shorter, so here a text of fewer than n words is one n-gram of its
whole length. It occurs in a set where a text of the set is the same, or, from 8 words on (the paper's least), contains
it; and from 8 words on, a short text of the set is looked for in the longer rows.

The sets are read once a scorer; they take 8 bytes for each of their n-grams, and as much for each run of 8 to n-1
words, in each process: 50 MB for 10,000 texts of 100 words. Rows pass one at a time, so there may be 100 M of them; the
limit is on the sets, at some 10 M words.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunery.data.scorers.ngrams import Hashes, ngram_hashes, word_hashes
from tunery.data.scorers.table import Columns
from tunery.data.scorers.texts import Part, part, words
from tunery.spec import Contamination
from tunery.store.rows import Row, read_rows

SHORTEST = 8
"""Words that two texts of different length must share in a row: fewer are in everything."""
_READ = 1024
"""Rows of a set at a time."""


class ContaminationScorer:
    def __init__(self, spec: Contamination, inputs: Mapping[str, Path]) -> None:
        settings = spec.contamination
        self._of, self._n = settings.of, settings.ngram
        self._sets = {name: Index(self._n).of(_texts(inputs[name], self._of)) for name in settings.sets}

    def __call__(self, rows: Sequence[Row]) -> Columns:
        """score: in [0, 1], NaN where there is no word; set: the one that most of the n-grams are in, or ""."""
        found = [self._overlap(hashed) for hashed in _hashed(rows, self._of)]
        return {"score": [score for score, _ in found], "set": [name for _, name in found]}

    def _overlap(self, hashed: Hashes) -> tuple[float, str]:
        if not len(hashed):
            return math.nan, ""
        hits = {name: index.hits(hashed) for name, index in self._sets.items()}
        # The first of equals, in the order of the experiment's file.
        most = max(hits, key=lambda name: int(hits[name].sum()))
        score = float(np.logical_or.reduce(list(hits.values())).mean())
        return score, most if score else ""


def _texts(artifact: Path, of: Part) -> Iterable[Hashes]:
    rows = read_rows(artifact, columns=["text", "messages"])
    while some := list(islice(rows, _READ)):
        yield from _hashed(some, of)


def _hashed(rows: Sequence[Row], of: Part) -> list[Hashes]:
    return word_hashes([words(part(row, of) or "") for row in rows])


@dataclass
class Index:
    """The n-grams of one set, as sorted hashes by their length in words."""

    n: int
    within: dict[int, Hashes] = field(default_factory=dict)
    """Runs of SHORTEST to n words in texts."""
    whole: dict[int, Hashes] = field(default_factory=dict)
    """Texts of fewer than n words."""

    def of(self, texts: Iterable[Hashes]) -> Index:
        within: dict[int, _Sorted] = defaultdict(_Sorted)
        whole: dict[int, _Sorted] = defaultdict(_Sorted)
        for hashed in texts:
            for length in range(min(SHORTEST, self.n), min(self.n, len(hashed)) + 1):
                within[length].add(ngram_hashes(hashed, length))
            if 0 < len(hashed) < self.n:
                whole[len(hashed)].add(ngram_hashes(hashed, self.n))
        self.within = {length: kept.all() for length, kept in within.items()}
        self.whole = {length: kept.all() for length, kept in whole.items()}
        return self

    def hits(self, hashed: Hashes) -> NDArray[np.bool_]:
        """Which n-grams of a text of at least one word (one a place where an n-gram starts) are in the set."""
        length = min(self.n, len(hashed))
        grams = ngram_hashes(hashed, self.n)
        found = _among(grams, self.within.get(length))
        if length < self.n:
            return found | _among(grams, self.whole.get(length))
        for shorter, texts in self.whole.items():
            if shorter >= SHORTEST:
                starts = np.flatnonzero(_among(ngram_hashes(hashed, shorter), texts))
                for start in starts.tolist():  # n-grams that contain the shorter text
                    found[max(0, start + shorter - self.n) : start + 1] = True
        return found


class _Sorted:
    """Distinct hashes, sorted now and then: as they come they would take many times their own memory."""

    def __init__(self) -> None:
        self._sorted = np.zeros(0, dtype=np.uint64)
        self._new: list[Hashes] = []
        self._waiting = 0

    def add(self, hashes: Hashes) -> None:
        self._new.append(hashes)
        self._waiting += len(hashes)
        if self._waiting > max(1_000_000, len(self._sorted)):
            self.all()

    def all(self) -> Hashes:
        self._sorted = np.unique(np.concatenate([self._sorted, *self._new]))
        self._new, self._waiting = [], 0
        return self._sorted


def _among(hashes: Hashes, known: Hashes | None) -> NDArray[np.bool_]:
    """Which of `hashes` are in the sorted `known`."""
    if known is None or not len(known):
        return np.zeros(len(hashes), dtype=np.bool_)
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    found: NDArray[np.bool_] = known[places] == hashes
    return found
