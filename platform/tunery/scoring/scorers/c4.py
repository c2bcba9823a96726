"""C4's rules (Raffel et al. 2020, https://arxiv.org/abs/1910.10683, section 2.2), as verdicts on rows.

A row at a time, in linear time, so 100 M rows are a matter of CPU hours alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tunery.scoring.scorers.registry import Columns
from tunery.scoring.scorers.texts import has_words, lines, select_text
from tunery.spec import C4, C4Rules
from tunery.store.rows import Row

TERMINAL = tuple('.!?"”»。！？」｡．؟۔।॥။។།።։')
"""Ends of sentences and of quotations, of several scripts."""
_WITHOUT_END_MARKS = "\u0e00-\u0eff"
"""Thai and Lao: a space ends a sentence there."""
_ENDS_WITHOUT_MARK = re.compile(f"[{_WITHOUT_END_MARKS}]")
POLICIES = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use of cookies", "use cookies")
_LATIN_SENTENCE = re.compile(r"[.!?][\"'”»)\]]?(?=\s|$)")
_SENTENCE = re.compile(
    rf"{_LATIN_SENTENCE.pattern}|[。！？｡؟۔।॥။។།።։]"
    rf"|(?<=[{_WITHOUT_END_MARKS}]) +(?=[{_WITHOUT_END_MARKS}])"
)
"""Where a sentence ends. The paper has it from a trained splitter (NLTK)."""


class C4Scorer:
    def __init__(self, spec: C4, inputs: Mapping[str, Path]) -> None:
        self._rules = spec.c4

    def __call__(self, rows: Sequence[Row]) -> Columns:
        """score: rules violated, NaN where all is white space; rules: their names."""
        found = [violated(select_text(row, self._rules.of), self._rules) for row in rows]
        return {
            "score": [math.nan if names is None else float(len(names)) for names in found],
            "rules": [", ".join(names or ()) for names in found],
        }


def violated(text: str | None, rules: C4Rules) -> list[str] | None:
    """Names of the rules, as their fields; None of a text without anything but white space."""
    shown = lines(text or "")
    if not shown:
        return None
    names, left = [], shown
    for name, fails in _line_rules(rules).items():
        failing = sum(map(fails, shown))
        if failing > rules.failing_lines_max * len(shown):
            names.append(name)
        if failing:
            left = [line for line in left if not fails(line)]
    if rules.sentences_min is not None and sentences(left) < rules.sentences_min:
        names.append("sentences_min")
    lowered = (text or "").lower()
    if rules.lorem_ipsum and "lorem ipsum" in lowered:
        names.append("lorem_ipsum")
    if rules.braces and ("{" in lowered or "}" in lowered):
        names.append("braces")
    return names


def _line_rules(rules: C4Rules) -> dict[str, Callable[[str], bool]]:
    """What takes a line out, by the name of the rule, for the rules that are on."""
    fewest = rules.line_words_min
    checks: dict[str, tuple[bool, Callable[[str], bool]]] = {
        "terminal_punctuation": (rules.terminal_punctuation, lambda line: not _is_ended(line)),
        "line_words_min": (fewest is not None, lambda line: not has_words(line, fewest or 0)),
        "javascript": (rules.javascript, lambda line: "javascript" in line.lower()),
        "policy": (rules.policy, lambda line: any(policy in line.lower() for policy in POLICIES)),
    }
    return {name: check for name, (on, check) in checks.items() if on}


def _is_ended(line: str) -> bool:
    """With an end mark, or in a script without any."""
    return line.endswith(TERMINAL) or (
        not line.isascii() and bool(_ENDS_WITHOUT_MARK.match(line.rstrip("\"'”’)]")[-1:]))
    )


def sentences(shown: Sequence[str]) -> int:
    """A line that ends without an end mark ends a sentence all the same."""
    return sum(
        len((_LATIN_SENTENCE if line.isascii() else _SENTENCE).findall(line)) + (not line.endswith(TERMINAL))
        for line in shown
    )
