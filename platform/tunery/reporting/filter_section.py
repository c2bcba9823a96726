"""Filters in the report: rows dropped by each rule, sample rows per decile, quarantine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunery.events.formatting import as_number, count, measure, plain
from tunery.events.run_state import RunState, StageState
from tunery.events.stage_summary import as_mapping, mappings_in
from tunery.reporting.score_section import rule_thresholds
from tunery.reporting.tables import Table, table


@dataclass(frozen=True)
class SampleRow:
    """A row of a decile, formatted for the page."""

    kept: bool
    score: str
    text: str
    corruption: str
    """Kind of the injected corruption; "" for an intact row."""


@dataclass(frozen=True)
class Decile:
    title: str
    counts: str
    percent_kept: int
    rows: list[SampleRow]
    mixed: bool
    """The decile has both kept and dropped rows."""


@dataclass(frozen=True)
class Filter:
    name: str
    tables: list[Table]
    """Rows dropped by each rule, diversity, and precision and recall if corruption was injected."""
    score: str
    deciles: list[Decile]


def filters(state: RunState) -> list[Filter]:
    """Each select stage, with rows of every decile of its first rule's score."""
    result = []
    for stage in state.stages.values():
        rules, samples = mappings_in(stage.facts.get("rules")), stage.facts.get("samples")
        if stage.kind != "select" or not isinstance(samples, Mapping):
            continue
        deciles = [_decile(decile) for decile in mappings_in(samples.get("deciles"))]
        tables = [*([_rules(stage, rules)] if rules else []), *_diversity(stage), *_quality(stage)]
        if tables:
            result.append(Filter(stage.name, tables, plain(samples.get("score")), deciles))
    return result


def _rules(stage: StageState, rules: list[Mapping[str, Any]]) -> Table:
    rows = [
        [
            plain(rule.get("rule")),
            " and ".join(_number(threshold) for threshold in rule_thresholds(rule)) or "none",
            as_number(rule.get("passed")),
            as_number(rule.get("dropped")),
        ]
        for rule in rules
    ]
    all_rules = stage.facts.get("combine") != "any"
    notes = []
    if len(rules) > 1:
        notes.append(
            "a dropped row is counted for the first rule that drops it"
            if all_rules
            else "a row is kept if at least one rule keeps it"
        )
    return table(["rule", "threshold", "passes alone", "dropped" if all_rules else "drops alone"], rows, notes=notes)


def _diversity(stage: StageState) -> list[Table]:
    """Coverage of the candidates by the selected rows, next to a random subset of the same size."""
    stats = as_mapping(stage.facts.get("diverse"))
    rows = [
        [label, as_number(coverage.get("radius")), as_number(coverage.get("similarity"))]
        for label, coverage in (
            (plain(stats.get("rule")), as_mapping(stats.get("coverage"))),
            ("random subset", as_mapping(stats.get("random"))),
        )
        if coverage
    ]
    if not rows:
        return []
    chance = as_mapping(stats.get("chance_similarity"))
    notes = [
        f"kept {count(as_number(stats.get('kept')) or 0)} of {count(as_number(stats.get('candidates')) or 0)} rows; "
        f"coverage computed on {count(as_number(stats.get('coverage_rows')) or 0)} of them",
        "radius: largest distance from a row to its nearest kept row; similarity: mean cosine to the nearest kept row",
    ]
    median, high = as_number(chance.get("median")), as_number(chance.get("high"))
    if median is not None and high is not None:
        notes.append(f"cosine of random pairs: median {measure(median)}, 95th percentile {measure(high)}")
    if (similar := as_number(stats.get("too_similar"))) is not None:
        notes.append(
            f"{count(similar)} rows were too similar to a kept row (above {plain(stats.get('max_similarity'))})"
        )
    return [table(["subset", "radius", "similarity"], rows, notes=notes)]


def _quality(stage: StageState) -> list[Table]:
    """Precision and recall on injected corruption, next to a random filter that drops as many rows."""
    metrics = as_mapping(stage.facts.get("injected_corruption"))
    values = [as_number(metrics.get(key)) for key in ("precision", "recall", "random_precision", "random_recall")]
    if values[0] is None:
        return []
    rows = [["this filter", *values[:2]], ["random filter", *values[2:]]]
    by_kind = {str(kind): as_number(recall) for kind, recall in as_mapping(metrics.get("recall_by_kind")).items()}
    columns = ["corrupted rows", "precision", "recall", *(f"recall: {kind}" for kind in by_kind)]
    return [table(columns, [[*rows[0], *by_kind.values()], rows[1]])]


def _decile(decile: Mapping[str, Any]) -> Decile:
    kept, dropped = as_number(decile.get("kept")) or 0, as_number(decile.get("dropped")) or 0
    low, high = as_number(decile.get("low")), as_number(decile.get("high"))
    bounds = [_number(bound) for bound in dict.fromkeys((low, high)) if bound is not None]
    rows = [
        SampleRow(is_kept, _score(row.get("score")), plain(row.get("text")), str(row.get("injected_corruption") or ""))
        for key, is_kept in (("kept_rows", True), ("dropped_rows", False))
        for row in mappings_in(decile.get(key))
    ]
    counts = f"{count(kept)} kept, {count(dropped)} dropped"
    percent = round(100 * kept / (kept + dropped)) if kept + dropped else 0
    return Decile(" – ".join(bounds), counts, percent, rows, bool(kept and dropped))


def _score(value: object) -> str:
    number = as_number(value)
    return _number(number) if number is not None else ""


def _number(value: float) -> str:
    """Format integral values (lengths, counts) without decimals."""
    return count(value) if float(value).is_integer() else measure(value)


def quarantines(state: RunState) -> list[tuple[str, list[Table]]]:
    """Quarantined rows with their reasons, as (stage, tables) for each dataset and score stage that has any."""
    result = []
    for stage in state.stages.values():
        quarantine = as_mapping(stage.facts.get("quarantine"))
        reasons = [[row.get("reason"), row.get("rows")] for row in mappings_in(quarantine.get("reasons"))]
        first = [
            [f"{row.get('source')}:{row.get('line')}", row.get("reason"), row.get("text") or ""]
            for row in mappings_in(quarantine.get("first"))
        ]
        if reasons:
            total = as_number(stage.facts.get("quarantined")) or 0
            note = f"all {count(total)} are in quarantine.jsonl in {stage.artifact or 'the artifact'}"
            tables = [
                table(["reason", "rows"], reasons, notes=[note]),
                table(["first rows", "reason", "excerpt"], first),
            ]
            result.append((stage.name, tables))
    return result
