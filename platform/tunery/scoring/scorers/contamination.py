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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunery.scoring.scorers.ngrams import Hashes, Integers, Words
from tunery.scoring.scorers.registry import Columns
from tunery.scoring.scorers.texts import Part, select_text
from tunery.spec import Contamination
from tunery.store.rows import Row, read_rows

SHORTEST = 8
"""Words that two texts of different length must share in a row: fewer are in everything."""
_READ = 1024
"""Rows of a set at a time."""
_NONE = np.zeros(0, dtype=np.uint64)


class ContaminationScorer:
    def __init__(self, spec: Contamination, inputs: Mapping[str, Path]) -> None:
        settings = spec.contamination
        self._of, self._n = settings.of, settings.ngram
        self._sets = {name: Index(self._n, _texts(inputs[name], self._of)) for name in settings.sets}

    def __call__(self, rows: Sequence[Row]) -> Columns:
        """score: in [0, 1], NaN where there is no word; set: the one that most of the n-grams are in, or ""."""
        text = _words(rows, self._of)
        ngrams = text.starts(self._n)
        total = np.bincount(text.text[ngrams], minlength=len(rows))
        hits = [index.hits(text) for index in self._sets.values()]
        counts = np.array([np.bincount(text.text[hit], minlength=len(rows)) for hit in hits])
        together = np.bincount(text.text[np.logical_or.reduce(hits)], minlength=len(rows))
        # Of sets with as many, the first in the experiment's file.
        names = [list(self._sets)[most] for most in counts.argmax(axis=0).tolist()]
        return {
            "score": [hit / count if count else math.nan for hit, count in zip(together.tolist(), total, strict=True)],
            "set": [name if hit else "" for name, hit in zip(names, together, strict=True)],
        }


def _texts(artifact: Path, of: Part) -> Iterator[Words]:
    rows = read_rows(artifact, columns=["text", "messages"])
    while some := list(islice(rows, _READ)):
        yield _words(some, of)


def _words(rows: Sequence[Row], of: Part) -> Words:
    return Words.of([select_text(row, of) or "" for row in rows])


class Index:
    """The n-grams of one set, as sorted hashes by their length in words."""

    def __init__(self, n: int, texts: Iterable[Words]) -> None:
        self._n = n
        within: dict[int, _Sorted] = defaultdict(_Sorted)
        whole: dict[int, _Sorted] = defaultdict(_Sorted)
        for some in texts:
            for length, hashes in some.runs(n):
                if length >= min(SHORTEST, n):
                    within[length].add(hashes[some.left >= length])
                if length < n:
                    whole[length].add(hashes[(some.size == length) & (some.left == length)])
        self._within = {length: kept.all() for length, kept in within.items()}
        """Runs of SHORTEST to n words in texts."""
        self._whole = {length: kept.all() for length, kept in whole.items()}
        """Texts of fewer than n words."""

    def hits(self, rows: Words) -> NDArray[np.bool_]:
        """At each word: whether the n-gram that starts there is in the set."""
        found = np.zeros(len(rows.hashes), dtype=np.bool_)
        for length, hashes in rows.runs(self._n):
            within, whole = self._within.get(length, _NONE), self._whole.get(length, _NONE)
            if length == self._n:
                found |= (rows.left >= length) & _among(hashes, within)
                continue
            alone = np.flatnonzero((rows.size == length) & (rows.left == length))
            found[alone] = _among(hashes[alone], within) | _among(hashes[alone], whole)
            if length >= SHORTEST and len(whole):
                longer = np.flatnonzero((rows.size >= self._n) & (rows.left >= length))
                self._mark(found, rows, longer[_among(hashes[longer], whole)], length)
        return found

    def _mark(self, found: NDArray[np.bool_], rows: Words, places: Integers, length: int) -> None:
        """Sets the n-grams that contain the runs of `length` words from `places` on."""
        since, left = rows.size[places] - rows.left[places], rows.left[places]
        lowest = places - np.minimum(since, self._n - length)
        highest = places - np.maximum(0, self._n - left)
        edges = np.zeros(len(found) + 1, dtype=np.int64)
        np.add.at(edges, lowest, 1)
        np.add.at(edges, highest + 1, -1)
        found |= np.cumsum(edges[:-1]) > 0


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


def _among(hashes: Hashes, known: Hashes) -> NDArray[np.bool_]:
    """Which of `hashes` are in the sorted `known`."""
    if not len(known):
        return np.zeros(len(hashes), dtype=np.bool_)
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    found: NDArray[np.bool_] = known[places] == hashes
    return found
