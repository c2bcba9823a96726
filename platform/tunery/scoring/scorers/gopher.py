"""Quality and repetition rules of MassiveText (Rae et al. 2021, https://arxiv.org/abs/2112.11446, A1.1 and table A1).

Where the paper leaves a choice: words are those of texts.py, including the punctuation around them; a line, paragraph
or n-gram is a duplicate from its second occurrence on, so a text that repeats everything once is half duplicate;
fractions of characters refer to the characters in words, lines or paragraphs, without the white space between them; and
an n-gram that occurs once is not a repetition. The paper's limits are for English; gopher_limits.py has those of other
languages.

Rows are scored one at a time in O(n log n) of their words, so 100 M rows take only CPU hours
(benchmarks/rule_scorers.py measures rows/s). Only the first MAX_CHARS characters of a row are scored.
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
from tunery.scoring.scorers.interfaces import Columns
from tunery.scoring.scorers.texts import MAX_CHARS, lines, script, select_text, words
from tunery.spec import Gopher, GopherRules
from tunery.store.rows import Row

BULLETS = ("•", "‣", "⁃", "◦", "●", "○", "■", "□", "▪", "▫", "- ", "* ", "– ")
"""Hyphens and asterisks include the space after them: `-1` and `*args` don't start a list item."""
ELLIPSES = ("...", "…")
MAX_TOP_NGRAM = 4
"""Up to this length the most frequent n-gram is measured; of longer n-grams all duplicates are."""
_BLANK_LINES = re.compile(r"\n[^\S\n]*\n")
_ASCII_PUNCTUATION = "\"'`.,;:!?()[]{}*_"
_PUNCTUATION = f"{_ASCII_PUNCTUATION}“”‘’«»„…–—¿¡。，、！？：；（）「」『』《》【】·।॥،؛؟۔၊။។៖།་፡።፣፤։՝՞՜\u200b"
"""Punctuation around words in several scripts."""


class GopherScorer:
    def __init__(self, spec: Gopher, inputs: Mapping[str, Path]) -> None:
        self._rules = spec.gopher

    def __call__(self, rows: Sequence[Row]) -> Columns:
        """Return "score", the number of violated rules (NaN for a row without words), and "rules", their names."""
        violations = [violated(select_text(row, self._rules.of), self._rules) for row in rows]
        return {
            "score": [math.nan if names is None else float(len(names)) for names in violations],
            "rules": [", ".join(names or ()) for names in violations],
        }


def violated(text: str | None, rules: GopherRules) -> list[str] | None:
    """Return the field names of the violated limits; None for a text without words."""
    text = (text or "")[:MAX_CHARS]
    text_words = words(text)
    if not text_words:
        return None
    text_lines = lines(text)
    text_script = script(text) or "Latin"
    punctuation = _ASCII_PUNCTUATION if text.isascii() else _PUNCTUATION
    distinct_words = {word.strip(punctuation).lower() for word in text_words}
    language, num_stop_words = language_and_stop_words(text_script, distinct_words)
    text_limits = limits(rules, text_script, language)
    measurements = (
        *_quality(text, text_words, text_lines),
        ("stop_words_min", num_stop_words),
        *_layout(text, text_lines),
        *_repetition(text_words),
    )
    return [rule for rule, value in measurements if _is_violated(rule, value, text_limits[rule])]


def _is_violated(rule: str, value: float, limit: float | None) -> bool:
    return limit is not None and (value < limit if rule.endswith("_min") else value > limit)


Measurement = tuple[str, float]
"""(rule, measured value)."""


def _quality(text: str, text_words: list[str], text_lines: list[str]) -> Iterator[Measurement]:
    count = len(text_words)
    mean = sum(map(len, text_words)) / count
    yield "words_min", count
    yield "words_max", count
    yield "mean_word_min", mean
    yield "mean_word_max", mean
    yield "hashes_max", text.count("#") / count
    yield "ellipses_max", sum(map(text.count, ELLIPSES)) / count
    yield "bullet_lines_max", _fraction(line.startswith(BULLETS) for line in text_lines)
    yield "ellipsis_lines_max", _fraction(line.endswith(ELLIPSES) for line in text_lines)
    yield "alphabetic_words_min", _fraction(any(map(str.isalpha, word)) for word in text_words)


def _layout(text: str, text_lines: list[str]) -> Iterator[Measurement]:
    fraction, char_fraction = duplicates(text_lines)
    yield "duplicate_lines_max", fraction
    yield "duplicate_line_chars_max", char_fraction
    paragraphs = [stripped for paragraph in _BLANK_LINES.split(text) if (stripped := paragraph.strip())]
    fraction, char_fraction = duplicates(paragraphs)
    yield "duplicate_paragraphs_max", fraction
    yield "duplicate_paragraph_chars_max", char_fraction


def _repetition(text_words: list[str]) -> Iterator[Measurement]:
    lengths = np.fromiter(map(len, text_words), dtype=np.int64, count=len(text_words))
    for n, grams, occurrences in repeated_ngrams(text_words, max_n=10):
        if n <= MAX_TOP_NGRAM:
            yield f"top_{n}gram_max", top_ngram_fraction(n, grams, occurrences, lengths)
        else:
            yield f"duplicate_{n}grams_max", duplicate_ngram_fraction(n, grams, lengths)


def duplicates(items: list[str]) -> tuple[float, float]:
    """Return the fraction of items, and of their characters, that repeat an earlier item."""
    counts = Counter(items)
    num_chars = sum(map(len, items))
    if len(counts) == len(items):
        return 0.0, 0.0
    return (len(items) - len(counts)) / len(items), (num_chars - sum(map(len, counts))) / num_chars


Grams = NDArray[np.int64]


def repeated_ngrams(words: list[str], max_n: int) -> Iterator[tuple[int, Grams, Grams]]:
    """Yield for each n from 2, as long as some n-gram occurs twice: n, the id of the n-gram at each position, and the
    number of occurrences of each id. Most texts repeat no pair of words and yield nothing."""
    word_ids: dict[str, int] = {}
    unigrams = np.array([word_ids.setdefault(word, len(word_ids)) for word in words], dtype=np.int64)
    grams = unigrams
    for n in range(2, min(max_n, len(words) - 1) + 1):
        # Exact ids instead of hashes: both factors are below the number of words.
        pairs = grams[:-1] * len(word_ids) + unigrams[n - 1 :]
        _, grams, occurrences = np.unique(pairs, return_inverse=True, return_counts=True)
        if len(occurrences) == len(grams):
            return
        yield n, grams, occurrences


def top_ngram_fraction(n: int, grams: Grams, occurrences: Grams, lengths: Grams) -> float:
    """Return the fraction of characters in occurrences of the most frequent n-gram (the longest in a tie)."""
    is_top = occurrences[grams] == occurrences.max()
    ends = np.cumsum(lengths)
    num_chars = ends[n - 1 :] - ends[: len(grams)] + lengths[: len(grams)]
    # Occurrences may overlap, which counts characters twice.
    return min(1.0, float(num_chars[is_top].max() * occurrences.max() / ends[-1]))


def duplicate_ngram_fraction(n: int, grams: Grams, lengths: Grams) -> float:
    """Return the fraction of characters in n-grams that repeat an earlier one; each character counts once."""
    _, first = np.unique(grams, return_index=True)
    is_repeat = np.ones(len(grams), dtype=np.int64)
    is_repeat[first] = 0
    edges = np.zeros(len(lengths) + 1, dtype=np.int64)
    edges[: len(grams)] += is_repeat
    edges[n : n + len(grams)] -= is_repeat
    return float(lengths[np.cumsum(edges[:-1]) > 0].sum() / lengths.sum())


def _fraction(flags: Iterator[bool]) -> float:
    """Return the fraction of true flags; there is at least one flag, because the text has words."""
    values = list(flags)
    return sum(values) / len(values)
