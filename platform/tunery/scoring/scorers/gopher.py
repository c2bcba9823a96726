"""MassiveText's quality and repetition rules (Rae et al. 2021, https://arxiv.org/abs/2112.11446, A1.1 and table A1).

Where the paper leaves a choice: words are those of texts.py, with the punctuation around them; a line, paragraph or
n-gram is a duplicate from its second occurrence on, so that a text that says everything twice is half duplicate; shares
of characters are of those in words, lines or paragraphs, without the white space between them; and an n-gram that
occurs once is no repetition. Its limits are for English; gopher_limits.py has those of other languages.

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

from tunery.scoring.scorers.gopher_limits import language_and_stop_words, limits
from tunery.scoring.scorers.registry import Columns
from tunery.scoring.scorers.texts import LONGEST, lines, script, select_text, words
from tunery.spec import Gopher, GopherRules
from tunery.store.rows import Row

BULLETS = ("•", "‣", "⁃", "◦", "●", "○", "■", "□", "▪", "▫", "- ", "* ", "– ")
"""Hyphens and asterisks with the space after them: `-1` and `*args` start no list."""
ELLIPSES = ("...", "…")
LONGEST_TOP = 4
"""Words of the n-grams of which the most frequent one counts; of longer ones all that repeat do."""
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")
_ASCII_PUNCTUATION = "\"'`.,;:!?()[]{}*_"
_PUNCTUATION = f"{_ASCII_PUNCTUATION}“”‘’«»„…–—¿¡。，、！？：；（）「」『』《》【】·।॥،؛؟۔၊။។៖།་፡።፣፤։՝՞՜\u200b"
"""Around words, of several scripts."""


class GopherScorer:
    def __init__(self, spec: Gopher, inputs: Mapping[str, Path]) -> None:
        self._rules = spec.gopher

    def __call__(self, rows: Sequence[Row]) -> Columns:
        """score: rules violated, NaN where there is no word; rules: their names."""
        found = [violated(select_text(row, self._rules.of), self._rules) for row in rows]
        return {
            "score": [math.nan if names is None else float(len(names)) for names in found],
            "rules": [", ".join(names or ()) for names in found],
        }


def violated(text: str | None, rules: GopherRules) -> list[str] | None:
    """Names of the rules, as the fields of their limits; None of a text without words."""
    text = (text or "")[:LONGEST]
    found = words(text)
    if not found:
        return None
    shown = lines(text)
    letters = script(text) or "Latin"
    punctuation = _ASCII_PUNCTUATION if text.isascii() else _PUNCTUATION
    language, stop_words = language_and_stop_words(letters, {word.strip(punctuation).lower() for word in found})
    own = limits(rules, letters, language)
    measures = (
        *_quality(text, found, shown),
        ("stop_words_min", stop_words),
        *_layout(text, shown),
        *_repetition(found),
    )
    return [rule for rule, value in measures if _is_beyond(rule, value, own[rule])]


def _is_beyond(rule: str, value: float, limit: float | None) -> bool:
    return limit is not None and (value < limit if rule.endswith("_min") else value > limit)


Measure = tuple[str, float]
"""The rule, and what it is about."""


def _quality(text: str, found: list[str], shown: list[str]) -> Iterator[Measure]:
    count = len(found)
    mean = sum(map(len, found)) / count
    yield "words_min", count
    yield "words_max", count
    yield "mean_word_min", mean
    yield "mean_word_max", mean
    yield "hashes_max", text.count("#") / count
    yield "ellipses_max", sum(map(text.count, ELLIPSES)) / count
    yield "bullet_lines_max", _share(line.startswith(BULLETS) for line in shown)
    yield "ellipsis_lines_max", _share(line.endswith(ELLIPSES) for line in shown)
    yield "alphabetic_words_min", _share(any(map(str.isalpha, word)) for word in found)


def _layout(text: str, shown: list[str]) -> Iterator[Measure]:
    repeated, characters = duplicates(shown)
    yield "duplicate_lines_max", repeated
    yield "duplicate_line_chars_max", characters
    repeated, characters = duplicates([stripped for one in _BLANK_LINES.split(text) if (stripped := one.strip())])
    yield "duplicate_paragraphs_max", repeated
    yield "duplicate_paragraph_chars_max", characters


def _repetition(found: list[str]) -> Iterator[Measure]:
    lengths = np.fromiter(map(len, found), dtype=np.int64, count=len(found))
    for n, grams, occurrences in repeated_ngrams(found, longest=10):
        if n <= LONGEST_TOP:
            yield f"top_{n}gram_max", top_share(n, grams, occurrences, lengths)
        else:
            yield f"duplicate_{n}grams_max", duplicate_share(n, grams, lengths)


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
