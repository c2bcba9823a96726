"""Keep rules: their thresholds are fitted to a scored dataset and applied to its shards."""

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
    direction: Literal["low", "high"]
    """Which scores are better."""
    threshold: Threshold
    dropped: int = 0
    """Rows dropped by this rule and not by an earlier one."""
    passed: int = 0
    """Rows that this rule alone would keep."""

    @property
    def description(self) -> str:
        return describe(self.score, self.keep)

    @property
    def sign(self) -> float:
        return _sign(self.keep, self.direction)

    def badness(self, scores: Scores) -> Floats:
        return self.sign * scores[self.score]

    def as_facts(self) -> dict[str, Any]:
        """Return the entry of this rule in the facts of a select artifact."""
        if self.keep.range is not None:
            thresholds = [end for end in self.keep.range if end is not None]
        else:
            thresholds = [self.sign * self.threshold.max_badness] if np.isfinite(self.threshold.max_badness) else []
        return {
            "score": self.score,
            "rule": self.description,
            "thresholds": thresholds,
            "dropped": self.dropped,
            "passed": self.passed,
        }


def _sign(keep: Keep, direction: str) -> float:
    return 1.0 if keep.range is not None or direction == "low" else -1.0


def fit_rules(
    table: ScoredRows, keeps: Mapping[str, Keep], directions: Mapping[str, str], match_counts: Mapping[str, int]
) -> list[Rule]:
    """Return the rules with thresholds fitted to `table`.

    `directions` maps each score to its better end as declared by its scorer, `match_counts` each score whose rule sets
    `match_count_of` to that number of rows.
    """
    rules: dict[str, Rule] = {}
    # `keep_fraction_of_rest` is a fraction of the rows that the other rules keep, so the other rules are fitted first.
    for score, keep in sorted(keeps.items(), key=lambda item: item[1].keep_fraction_of_rest is not None):
        direction: Any = keep.prefer or directions.get(score, "low")
        prior_rules = (
            [rule for rule in rules.values() if rule.keep.keep_fraction_of_rest is None]
            if keep.keep_fraction_of_rest is not None
            else []
        )

        def chunks(
            score: str = score, sign: float = _sign(keep, direction), prior_rules: Sequence[Rule] = prior_rules
        ) -> Iterator[Floats]:
            unused_rules = reset_ties(prior_rules)
            for shard in table.files:
                scores = table.scores(shard)
                badness = sign * scores[score]
                masks = rule_masks(unused_rules, scores)
                yield badness[np.logical_and.reduce(masks)] if masks else badness

        threshold = find_threshold(chunks, keep, direction, table.rows, match_counts.get(score))
        rules[score] = Rule(score, keep, direction, threshold)
    return [rules[score] for score in keeps]


def reset_ties(rules: Sequence[Rule]) -> list[Rule]:
    """Return copies of rules that have not been applied yet; applying a threshold uses up its ties."""
    return [Rule(rule.score, rule.keep, rule.direction, Threshold(**vars(rule.threshold))) for rule in rules]


def rule_masks(rules: Sequence[Rule], scores: Scores) -> list[Bools]:
    """Return the mask of the next rows for each rule. A `keep_fraction_of_rest` rule only keeps rows that all rules
    without one keep."""
    masks = {
        rule.score: rule.threshold.mask(rule.badness(scores))
        for rule in rules
        if rule.keep.keep_fraction_of_rest is None
    }
    rest = np.logical_and.reduce(list(masks.values())) if masks else np.True_
    for rule in rules:
        if rule.keep.keep_fraction_of_rest is not None:
            masks[rule.score] = rule.threshold.mask(np.where(rest, rule.badness(scores), np.nan))
    return [masks[rule.score] for rule in rules]


def apply_rules(
    rules: Sequence[Rule], combine: Literal["all", "any"], scores: Scores, num_rows: int
) -> tuple[Bools, list[str]]:
    """Return which of the next `num_rows` rows pass, and for each the rule that dropped it ("" if it passes).

    With combine "all", the reason is the first rule that drops the row, `keep_fraction_of_rest` rules last. With "any",
    a dropped row was dropped by every rule, and the reason names all of them.
    """
    reasons = [""] * num_rows
    if not rules:
        return np.ones(num_rows, dtype=np.bool_), reasons
    masks = dict(zip((rule.score for rule in rules), rule_masks(rules, scores), strict=True))
    stacked = list(masks.values())
    kept: Bools = np.logical_and.reduce(stacked) if combine == "all" else np.logical_or.reduce(stacked)
    undecided = ~kept
    for rule in sorted(rules, key=lambda rule: rule.keep.keep_fraction_of_rest is not None):
        rule.passed += int(masks[rule.score].sum())
        dropped = undecided & ~masks[rule.score]
        rule.dropped += int(dropped.sum())
        if combine == "all":
            for index in np.flatnonzero(dropped):
                reasons[index] = rule.description
            undecided &= masks[rule.score]
    if combine == "any":
        all_rules = " and ".join(rule.description for rule in rules)
        for index in np.flatnonzero(~kept):
            reasons[index] = all_rules
    return kept, reasons
