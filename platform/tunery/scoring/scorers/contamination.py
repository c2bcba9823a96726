"""Contamination: the fraction of a row's n-grams that occur in evaluation sets (Brown et al. 2020, appendix C,
https://arxiv.org/abs/2005.14165).

As in the paper, words are compared without case and punctuation. The paper's n (8 to 13) is below the length of nearly
all its examples. Rows of questions and answers are often shorter, so here a text of fewer than n words is a single
n-gram of its full length. It occurs in a set if a text of the set is equal to it or, from 8 words on (the minimum of
the paper), contains it. Conversely, a short text of the set with at least 8 words is searched for in longer rows.

Each scorer reads the sets once. In each process they take 8 bytes per n-gram and per sequence of 8 to n-1 words: 50 MB
for 10,000 texts of 100 words. Rows are streamed, so their number is not limited; the sets may have about 10 M words.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunery.scoring.scorers.interfaces import Columns
from tunery.scoring.scorers.ngrams import Hashes, Integers, Words
from tunery.scoring.scorers.texts import select_text
from tunery.spec import Contamination
from tunery.spec.scorers.scorer_entry import RowPart
from tunery.store.rows import Row, read_rows

MIN_SHARED_WORDS = 8
"""Minimum number of consecutive words that texts of different lengths must share; shorter sequences are too common."""
_READ_BATCH_SIZE = 1024
_EMPTY = np.zeros(0, dtype=np.uint64)


class ContaminationScorer:
    def __init__(self, spec: Contamination, inputs: Mapping[str, Path]) -> None:
        settings = spec.contamination
        self._of, self._n = settings.of, settings.ngram
        self._indexes = {name: NgramIndex(self._n, _read_texts(inputs[name], self._of)) for name in settings.sets}

    def __call__(self, rows: Sequence[Row]) -> Columns:
        """Return "score" in [0, 1] (NaN for a row without words) and "set", the set with the most matches, or ""."""
        words = _words_of(rows, self._of)
        is_ngram = words.starts(self._n)
        num_ngrams = np.bincount(words.text[is_ngram], minlength=len(rows))
        matches = [index.match(words) for index in self._indexes.values()]
        set_counts = np.array([np.bincount(words.text[match], minlength=len(rows)) for match in matches])
        num_matches = np.bincount(words.text[np.logical_or.reduce(matches)], minlength=len(rows))
        # In a tie, the first set in the experiment file.
        sets = [list(self._indexes)[index] for index in set_counts.argmax(axis=0).tolist()]
        return {
            "score": [
                count / total if total else math.nan
                for count, total in zip(num_matches.tolist(), num_ngrams, strict=True)
            ],
            "set": [name if count else "" for name, count in zip(sets, num_matches, strict=True)],
        }


def _read_texts(artifact: Path, of: RowPart) -> Iterator[Words]:
    rows = read_rows(artifact, columns=["text", "messages"])
    while batch := list(islice(rows, _READ_BATCH_SIZE)):
        yield _words_of(batch, of)


def _words_of(rows: Sequence[Row], of: RowPart) -> Words:
    return Words.of([select_text(row, of) or "" for row in rows])


class NgramIndex:
    """The n-grams of one set, as sorted hashes by length in words."""

    def __init__(self, n: int, texts: Iterable[Words]) -> None:
        self._n = n
        sequences: dict[int, _HashSet] = defaultdict(_HashSet)
        short_texts: dict[int, _HashSet] = defaultdict(_HashSet)
        for words in texts:
            for length, hashes in words.runs(n):
                if length >= min(MIN_SHARED_WORDS, n):
                    sequences[length].add(hashes[words.left >= length])
                if length < n:
                    short_texts[length].add(hashes[(words.size == length) & (words.left == length)])
        self._sequences = {length: hash_set.to_sorted() for length, hash_set in sequences.items()}
        """Sequences of MIN_SHARED_WORDS to n words in texts."""
        self._short_texts = {length: hash_set.to_sorted() for length, hash_set in short_texts.items()}
        """Complete texts of fewer than n words."""

    def match(self, words: Words) -> NDArray[np.bool_]:
        """Return for each word whether the n-gram that starts there is in the set."""
        matches = np.zeros(len(words.hashes), dtype=np.bool_)
        for length, hashes in words.runs(self._n):
            sequences, short_texts = self._sequences.get(length, _EMPTY), self._short_texts.get(length, _EMPTY)
            if length == self._n:
                matches |= (words.left >= length) & _is_in(hashes, sequences)
                continue
            short = np.flatnonzero((words.size == length) & (words.left == length))
            matches[short] = _is_in(hashes[short], sequences) | _is_in(hashes[short], short_texts)
            if length >= MIN_SHARED_WORDS and len(short_texts):
                longer = np.flatnonzero((words.size >= self._n) & (words.left >= length))
                self._mark_containing(matches, words, longer[_is_in(hashes[longer], short_texts)], length)
        return matches

    def _mark_containing(self, matches: NDArray[np.bool_], words: Words, starts: Integers, length: int) -> None:
        """Mark in place the n-grams that contain one of the sequences of `length` words that begin at `starts`."""
        num_before, num_left = words.size[starts] - words.left[starts], words.left[starts]
        first = starts - np.minimum(num_before, self._n - length)
        last = starts - np.maximum(0, self._n - num_left)
        edges = np.zeros(len(matches) + 1, dtype=np.int64)
        np.add.at(edges, first, 1)
        np.add.at(edges, last + 1, -1)
        matches |= np.cumsum(edges[:-1]) > 0


class _HashSet:
    """Distinct hashes in a sorted array; new ones are buffered and merged when they outnumber the array."""

    def __init__(self) -> None:
        self._sorted = np.zeros(0, dtype=np.uint64)
        self._buffer: list[Hashes] = []
        self._num_buffered = 0

    def add(self, hashes: Hashes) -> None:
        self._buffer.append(hashes)
        self._num_buffered += len(hashes)
        if self._num_buffered > max(1_000_000, len(self._sorted)):
            self.to_sorted()

    def to_sorted(self) -> Hashes:
        self._sorted = np.unique(np.concatenate([self._sorted, *self._buffer]))
        self._buffer, self._num_buffered = [], 0
        return self._sorted


def _is_in(hashes: Hashes, sorted_hashes: Hashes) -> NDArray[np.bool_]:
    """Return which of `hashes` are in `sorted_hashes`."""
    if not len(sorted_hashes):
        return np.zeros(len(hashes), dtype=np.bool_)
    positions = np.minimum(np.searchsorted(sorted_hashes, hashes), len(sorted_hashes) - 1)
    is_in: NDArray[np.bool_] = sorted_hashes[positions] == hashes
    return is_in
