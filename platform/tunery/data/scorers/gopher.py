"""MassiveText's quality and repetition rules (Rae et al. 2021, https://arxiv.org/abs/2112.11446, A1.1 and table A1).

Where the paper leaves a choice: words are what white space separates; a line, paragraph or n-gram is a duplicate from
its second occurrence on, so that a text that says everything twice is half duplicate; shares of characters are of those
in words, lines or paragraphs, without the white space between them; and an n-gram that occurs once is no repetition.

A row at a time, in time n log n of its words, so 100 M rows are a matter of CPU hours alone (benchmarks/rule_scorers.py
has rows/s). Of a row, the first LONGEST characters are looked at.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tunery.data.scorers.table import Columns
from tunery.data.scorers.texts import LONGEST, lines, part
from tunery.spec import Gopher, GopherRules
from tunery.store.rows import Row

STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
BULLETS = ("•", "‣", "⁃", "◦", "●", "○", "■", "□", "▪", "▫", "- ", "* ", "– ")
"""Hyphens and asterisks with the space after them: `-1` and `*args` start no list."""
ELLIPSES = ("...", "…")
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")
_PUNCTUATION = "\"'`.,;:!?()[]{}*_"


class GopherScorer:
    def __init__(self, spec: Gopher, inputs: Mapping[str, Path]) -> None:
        self._rules = spec.gopher

    def __call__(self, rows: Sequence[Row]) -> Columns:
        """score: rules violated, NaN where there is no word; rules: their names."""
        found = [violated(part(row, self._rules.of), self._rules) for row in rows]
        return {
            "score": [math.nan if names is None else float(len(names)) for names in found],
            "rules": [", ".join(names or ()) for names in found],
        }


def violated(text: str | None, rules: GopherRules) -> list[str] | None:
    """Names of the rules, as the fields of their limits; None of a text without words."""
    text = (text or "")[:LONGEST]
    words = text.split()
    if not words:
        return None
    shown = lines(text)
    return [
        name
        for measures in (_quality(text, words, shown, rules), _layout(text, shown, rules), _repetition(words, rules))
        for name, value, lowest, highest in measures
        if (lowest is not None and value < lowest) or (highest is not None and value > highest)
    ]


Measure = tuple[str, float, float | None, float | None]
"""Rule, what was measured, and the limits."""


def _quality(text: str, words: list[str], shown: list[str], rules: GopherRules) -> Iterator[Measure]:
    count = len(words)
    mean = sum(map(len, words)) / count
    yield "words_min", count, rules.words_min, None
    yield "words_max", count, None, rules.words_max
    yield "mean_word_min", mean, rules.mean_word_min, None
    yield "mean_word_max", mean, None, rules.mean_word_max
    yield "hashes_max", text.count("#") / count, None, rules.hashes_max
    yield "ellipses_max", sum(map(text.count, ELLIPSES)) / count, None, rules.ellipses_max
    yield "bullet_lines_max", _share(line.startswith(BULLETS) for line in shown), None, rules.bullet_lines_max
    yield "ellipsis_lines_max", _share(line.endswith(ELLIPSES) for line in shown), None, rules.ellipsis_lines_max
    alphabetic = _share(any(map(str.isalpha, word)) for word in words)
    yield "alphabetic_words_min", alphabetic, rules.alphabetic_words_min, None
    stop_words = STOP_WORDS.intersection(word.strip(_PUNCTUATION).lower() for word in words)
    yield "stop_words_min", len(stop_words), rules.stop_words_min, None


def _layout(text: str, shown: list[str], rules: GopherRules) -> Iterator[Measure]:
    repeated, characters = duplicates(shown)
    yield "duplicate_lines_max", repeated, None, rules.duplicate_lines_max
    yield "duplicate_line_chars_max", characters, None, rules.duplicate_line_chars_max
    repeated, characters = duplicates([stripped for one in _BLANK_LINES.split(text) if (stripped := one.strip())])
    yield "duplicate_paragraphs_max", repeated, None, rules.duplicate_paragraphs_max
    yield "duplicate_paragraph_chars_max", characters, None, rules.duplicate_paragraph_chars_max


def _repetition(words: list[str], rules: GopherRules) -> Iterator[Measure]:
    tops = {2: rules.top_2gram_max, 3: rules.top_3gram_max, 4: rules.top_4gram_max}
    repeats = {
        5: rules.duplicate_5grams_max,
        6: rules.duplicate_6grams_max,
        7: rules.duplicate_7grams_max,
        8: rules.duplicate_8grams_max,
        9: rules.duplicate_9grams_max,
        10: rules.duplicate_10grams_max,
    }
    lengths = np.fromiter(map(len, words), dtype=np.int64, count=len(words))
    for n, grams, occurrences in repeated_ngrams(words, longest=10):
        if n in tops:
            yield f"top_{n}gram_max", top_share(n, grams, occurrences, lengths), None, tops[n]
        elif n in repeats:
            yield f"duplicate_{n}grams_max", duplicate_share(n, grams, lengths), None, repeats[n]


def duplicates(pieces: list[str]) -> tuple[float, float]:
    """Shares, of pieces and of their characters, that stood before."""
    counts = Counter(pieces)
    characters = sum(map(len, pieces))
    if len(counts) == len(pieces):
        return 0.0, 0.0
    return (len(pieces) - len(counts)) / len(pieces), (characters - sum(map(len, counts))) / characters


Grams = NDArray[np.int64]


def repeated_ngrams(words: list[str], longest: int) -> Iterator[tuple[int, Grams, Grams]]:
    """For n from 2 as long as some n-gram occurs twice: n, the number of the n-gram at each place, and how often each
    number occurs. Where no pair of words comes back, no longer run does; most texts end there."""
    numbers: dict[str, int] = {}
    singles = np.array([numbers.setdefault(word, len(numbers)) for word in words], dtype=np.int64)
    grams = singles
    for n in range(2, min(longest, len(words) - 1) + 1):
        # Exact, not a hash: both factors are below the number of words.
        pairs = grams[:-1] * len(numbers) + singles[n - 1 :]
        _, grams, occurrences = np.unique(pairs, return_inverse=True, return_counts=True)
        if len(occurrences) == len(grams):
            return
        yield n, grams, occurrences


def top_share(n: int, grams: Grams, occurrences: Grams, lengths: Grams) -> float:
    """Share of the characters that are in occurrences of the most frequent n-gram; of the longest of equals."""
    tops = occurrences[grams] == occurrences.max()
    ends = np.cumsum(lengths)
    characters = ends[n - 1 :] - ends[: len(grams)] + lengths[: len(grams)]
    # Occurrences may overlap, which counts their characters twice.
    return min(1.0, float(characters[tops].max() * occurrences.max() / ends[-1]))


def duplicate_share(n: int, grams: Grams, lengths: Grams) -> float:
    """Share of the characters that are in an n-gram that stood before, each counted once."""
    _, first = np.unique(grams, return_index=True)
    again = np.ones(len(grams), dtype=np.int64)
    again[first] = 0
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    edges[: len(grams)] += again
    edges[n : n + len(grams)] -= again
    return float(lengths[np.cumsum(edges[:-1]) > 0].sum() / lengths.sum())


def _share(flags: Iterator[bool]) -> float:
    """Of a text with words: there is a line."""
    values = list(flags)
    return sum(values) / len(values)
