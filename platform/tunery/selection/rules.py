"""Rules with their cuts, and what they decide about a shard of rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from tunery.ingest.corruption_metrics import Bools, Floats
from tunery.selection.scored_rows import ScoredRows
from tunery.selection.thresholds import Threshold, describe, find_threshold
from tunery.spec import Keep

Scores = Mapping[str, Floats]


@dataclass
class Rule:
    score: str
    keep: Keep
    good: Literal["low", "high"]
    cut: Threshold
    dropped: int = 0
    """Rows that this rule was the one to drop."""
    passed: int = 0
    """Rows that it would keep by itself."""

    @property
    def described(self) -> str:
        return describe(self.score, self.keep)

    @property
    def sign(self) -> float:
        return _sign(self.keep, self.good)

    def badness(self, scores: Scores) -> Floats:
        return self.sign * scores[self.score]

    def told(self) -> dict[str, Any]:
        if self.keep.range is not None:
            cuts = [end for end in self.keep.range if end is not None]
        else:
            cuts = [self.sign * self.cut.worst] if np.isfinite(self.cut.worst) else []
        return {
            "score": self.score,
            "rule": self.described,
            "cut": cuts[0] if cuts else None,
            "cuts": cuts,
            "dropped": self.dropped,
            "passed": self.passed,
        }


def _sign(keep: Keep, good: str) -> float:
    return 1.0 if keep.range is not None or good == "low" else -1.0


def fit_rules(
    table: ScoredRows, keeps: Mapping[str, Keep], goods: Mapping[str, str], as_many: Mapping[str, int]
) -> list[Rule]:
    """The rules with their cuts in the rows at hand. `goods`: which end of each score is good, by its scorer;
    `as_many`: by score, what `match_count_of` came to."""
    found: dict[str, Rule] = {}
    # A fraction is of what the other rules leave, so those come first.
    for score, keep in sorted(keeps.items(), key=lambda item: item[1].keep_fraction_of_rest is not None):
        good: Any = keep.prefer or goods.get(score, "low")
        before = (
            [rule for rule in found.values() if rule.keep.keep_fraction_of_rest is None]
            if keep.keep_fraction_of_rest is not None
            else []
        )

        def pieces(
            score: str = score, sign: float = _sign(keep, good), before: Sequence[Rule] = before
        ) -> Iterator[Floats]:
            fresh = reset_ties(before)
            for shard in table.files:
                scores = table.scores(shard)
                badness = sign * scores[score]
                passed = rule_masks(fresh, scores)
                yield badness[np.logical_and.reduce(passed)] if passed else badness

        cut = find_threshold(pieces, keep, good, table.rows, as_many.get(score))
        found[score] = Rule(score, keep, good, cut)
    return [found[score] for score in keeps]


def reset_ties(rules: Sequence[Rule]) -> list[Rule]:
    """Rules that have decided on nothing yet: a cut counts down its ties."""
    return [Rule(rule.score, rule.keep, rule.good, Threshold(**vars(rule.cut))) for rule in rules]


def rule_masks(rules: Sequence[Rule], scores: Scores) -> list[Bools]:
    """Which of the next rows each rule keeps; one of a fraction only among those that the rules without one keep."""
    found = {
        rule.score: rule.cut.passing(rule.badness(scores)) for rule in rules if rule.keep.keep_fraction_of_rest is None
    }
    left = np.logical_and.reduce(list(found.values())) if found else np.True_
    for rule in rules:
        if rule.keep.keep_fraction_of_rest is not None:
            found[rule.score] = rule.cut.passing(np.where(left, rule.badness(scores), np.nan))
    return [found[rule.score] for rule in rules]


def apply_rules(
    rules: Sequence[Rule], combine: Literal["all", "any"], scores: Scores, rows: int
) -> tuple[Bools, list[str]]:
    """Which of the next rows, so many, pass, and for each the rule that dropped it ("" where it passes).

    Of several rules that drop a row the first is named, those of a fraction last; where any is enough to pass, all of
    them dropped it.
    """
    reasons = [""] * rows
    if not rules:
        return np.ones(rows, dtype=np.bool_), reasons
    passed = dict(zip((rule.score for rule in rules), rule_masks(rules, scores), strict=True))
    every = list(passed.values())
    kept: Bools = np.logical_and.reduce(every) if combine == "all" else np.logical_or.reduce(every)
    open_rows = ~kept
    for rule in sorted(rules, key=lambda rule: rule.keep.keep_fraction_of_rest is not None):
        rule.passed += int(passed[rule.score].sum())
        mine = open_rows & ~passed[rule.score]
        rule.dropped += int(mine.sum())
        if combine == "all":
            for index in np.flatnonzero(mine):
                reasons[index] = rule.described
            open_rows &= passed[rule.score]
    if combine == "any":
        named = " and ".join(rule.described for rule in rules)
        for index in np.flatnonzero(~kept):
            reasons[index] = named
    return kept, reasons
