"""The cleaning rules of C4 (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.2), as a score of rows.

Rows are scored one at a time in linear time, so 100 M rows take only CPU hours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tunery.scoring.scorers.interfaces import Columns
from tunery.scoring.scorers.texts import has_words, lines, select_text
from tunery.spec import C4, C4Rules
from tunery.store.rows import Row

TERMINAL = tuple('.!?"”»。！？」｡．؟۔।॥။។།።։')
"""End marks of sentences and quotations in several scripts."""
_WITHOUT_END_MARKS = "\u0e00-\u0eff"
"""Thai and Lao, in which a space ends a sentence."""
_ENDS_WITHOUT_MARK = re.compile(f"[{_WITHOUT_END_MARKS}]")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_LATIN_SENTENCE = re.compile(r"[.!?][\"'”»)\]]?(?=\s|$)")
_SENTENCE = re.compile(
    rf"{_LATIN_SENTENCE.pattern}|[。！？｡؟۔।॥။។།።։]"
    rf"|(?<=[{_WITHOUT_END_MARKS}]) +(?=[{_WITHOUT_END_MARKS}])"
)
"""The end of a sentence. The paper uses a trained sentence splitter (NLTK)."""


class C4Scorer:
    def __init__(self, spec: C4, inputs: Mapping[str, Path]) -> None:
        self._rules = spec.c4

    def __call__(self, rows: Sequence[Row]) -> Columns:
        """Return "score", the number of violated rules (NaN for blank text), and "rules", their names."""
        violations = [violated(select_text(row, self._rules.of), self._rules) for row in rows]
        return {
            "score": [math.nan if names is None else float(len(names)) for names in violations],
            "rules": [", ".join(names or ()) for names in violations],
        }


def violated(text: str | None, rules: C4Rules) -> list[str] | None:
    """Return the field names of the violated rules; None for blank text."""
    text_lines = lines(text or "")
    if not text_lines:
        return None
    names, passing_lines = [], text_lines
    for name, fails in _line_rules(rules).items():
        num_failing = sum(map(fails, text_lines))
        if num_failing > rules.failing_lines_max * len(text_lines):
            names.append(name)
        if num_failing:
            passing_lines = [line for line in passing_lines if not fails(line)]
    if rules.sentences_min is not None and count_sentences(passing_lines) < rules.sentences_min:
        names.append("sentences_min")
    lowered = (text or "").lower()
    if rules.lorem_ipsum and "lorem ipsum" in lowered:
        names.append("lorem_ipsum")
    if rules.braces and ("{" in lowered or "}" in lowered):
        names.append("braces")
    return names


def _line_rules(rules: C4Rules) -> dict[str, Callable[[str], bool]]:
    """Return the enabled rules that remove lines, as functions that are true for a line to remove, by name."""
    min_words = rules.line_words_min
    checks: dict[str, tuple[bool, Callable[[str], bool]]] = {
        "terminal_punctuation": (rules.terminal_punctuation, lambda line: not _is_ended(line)),
        "line_words_min": (min_words is not None, lambda line: not has_words(line, min_words or 0)),
        "javascript": (rules.javascript, lambda line: "javascript" in line.lower()),
        "policy": (rules.policy, lambda line: any(policy in line.lower() for policy in POLICIES)),
    }
    return {name: check for name, (enabled, check) in checks.items() if enabled}


def _is_ended(line: str) -> bool:
    """Return whether a line ends with an end mark or is in a script without end marks."""
    return line.endswith(TERMINAL) or (
        not line.isascii() and bool(_ENDS_WITHOUT_MARK.match(line.rstrip("\"'”’)]")[-1:]))
    )


def count_sentences(text_lines: Sequence[str]) -> int:
    """Count sentences; the end of a line always ends a sentence."""
    return sum(
        len((_LATIN_SENTENCE if line.isascii() else _SENTENCE).findall(line)) + (not line.endswith(TERMINAL))
        for line in text_lines
    )
