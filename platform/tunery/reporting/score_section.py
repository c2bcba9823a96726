"""Scores in the report: histograms with the thresholds of filters, joint histograms, AUC on injected corruption."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.events.formatting import as_number, measure, plain
from tunery.events.run_state import RunState, StageState
from tunery.events.stage_summary import as_mapping, mappings_in
from tunery.reporting.charts import ThresholdLine, histogram_chart
from tunery.reporting.heatmap import heatmap_chart
from tunery.reporting.tables import Figure, Table, table
from tunery.spec import STAGE_KINDS

MAX_THRESHOLDS = 5
"""Threshold lines in a histogram: thresholds of trials are added up to this number."""


def score_figures(state: RunState) -> list[Figure]:
    """For each score: its histogram with the thresholds of the select stages that use it."""
    figures = []
    for stage in state.stages.values():
        for name, score in _scores(stage).items():
            figures.append(_score_figure(state, stage, name, score))
    return [figure for figure in figures if figure.svg]


def _score_figure(state: RunState, stage: StageState, name: str, score: Mapping[str, Any]) -> Figure:
    histogram = as_mapping(score.get("histogram"))
    edges, counts, corrupted = (
        [as_number(v) or 0 for v in histogram.get(key) or []] for key in ("edges", "counts", "corrupted")
    )
    thresholds = [
        ThresholdLine(value, f"{select.name}: {label}")
        for select in state.stages.values()
        if _is_downstream(state, select, stage)
        for rule in _rules(select, name)
        for value, label in zip(rule_thresholds(rule), _threshold_labels(rule), strict=True)
    ]
    known = {threshold.value for threshold in thresholds}
    for trial in state.search.trials.values() if state.search else ():
        for select in trial.stages.values():
            for rule in _rules(select, name):
                for value in rule_thresholds(rule):
                    if value not in known and len(thresholds) < MAX_THRESHOLDS:
                        known.add(value)
                        thresholds.append(ThresholdLine(value, f"{plain(rule.get('rule'))} (in trials)", quiet=True))
    auc, median = as_number(score.get("auc")), as_number(score.get("median"))
    notes = [f"median {measure(median)}"] if median is not None else []
    notes += [f"AUC {auc:.3f} at detecting corrupted rows (0.5 is chance)"] if auc is not None else []
    keys = [("good", "intact rows"), ("bad", "corrupted rows")] if any(corrupted) else []
    return Figure(
        f"{name} ({stage.name})",
        histogram_chart(edges, counts, corrupted, thresholds, name),
        "; ".join(notes),
        keys,
    )


def _threshold_labels(rule: Mapping[str, Any]) -> list[str]:
    """One label for each threshold of the rule; the text of a range rule contains both of its ends."""
    thresholds, label = rule_thresholds(rule), plain(rule.get("rule"))
    if len(thresholds) == 2:
        return [label, "other end of the range"]
    return [f"{label}, threshold {measure(threshold)}" for threshold in thresholds]


def auc_tables(state: RunState) -> list[tuple[str, Table]]:
    """AUC of every score for every kind of injected corruption, as (stage, table) for each score stage with any."""
    tables = []
    for stage in state.stages.values():
        scores = _scores(stage)
        kinds = sorted({str(kind) for score in scores.values() for kind in as_mapping(score.get("auc_by_kind"))})
        rows = [
            [
                name,
                as_number(score.get("auc")),
                *(as_number(as_mapping(score.get("auc_by_kind")).get(k)) for k in kinds),
            ]
            for name, score in scores.items()
            if as_number(score.get("auc")) is not None
        ]
        if rows:
            best = dict.fromkeys(range(1, len(kinds) + 2), STAGE_KINDS["score"].other_metrics["auc"])
            notes = ["AUC: probability that a corrupted row scores worse than an intact row (0.5 is chance)"]
            tables.append((stage.name, table(["score", "all kinds", *kinds], rows, notes=notes, best=best)))
    return tables


def heatmap_figures(state: RunState) -> list[Figure]:
    """Joint histograms of the score pairs that the score stages counted."""
    figures = []
    for stage in state.stages.values():
        for pair in mappings_in(stage.facts.get("pairs")):
            x, y = str(pair.get("x")), str(pair.get("y"))
            edges = [_numbers(pair.get(key)) for key in ("x_edges", "y_edges")]
            counts = [_numbers(row) for row in pair.get("counts") or []]
            thresholds = (_thresholds(state, stage, x), _thresholds(state, stage, y))
            chart = heatmap_chart(edges[0], edges[1], counts, (x, y), thresholds)
            if chart:
                note = "dashed lines: thresholds" if any(thresholds) else ""
                figures.append(Figure(f"{x} and {y} ({stage.name})", chart, note))
    return figures


def rule_thresholds(rule: Mapping[str, Any]) -> list[float]:
    """The thresholds of a rule: two for a range."""
    values = rule.get("thresholds")
    if not isinstance(values, list | tuple):
        return []
    return [number for value in values if (number := as_number(value)) is not None]


def _is_downstream(state: RunState, stage: StageState, of: StageState) -> bool:
    """Return whether `stage` reads the output of `of`, directly or through other stages; True for a stage whose inputs
    are not logged."""
    pending, visited = list(stage.inputs), {stage.name}
    if not pending:
        return True
    while pending:
        name = pending.pop()
        if name == of.name:
            return True
        if name not in visited and name in state.stages:
            visited.add(name)
            pending += state.stages[name].inputs
    return False


def _thresholds(state: RunState, scored: StageState, score: str) -> list[float]:
    return [
        threshold
        for stage in state.stages.values()
        if _is_downstream(state, stage, scored)
        for rule in _rules(stage, score)
        for threshold in rule_thresholds(rule)
    ]


def _rules(stage: StageState, score: str) -> list[Mapping[str, Any]]:
    return [rule for rule in mappings_in(stage.facts.get("rules")) if rule.get("score") == score]


def _scores(stage: StageState) -> dict[str, Mapping[str, Any]]:
    scores = as_mapping(stage.facts.get("scores"))
    return {str(name): score for name, score in scores.items() if isinstance(score, Mapping)}


def _numbers(values: object) -> list[float]:
    return [as_number(value) or 0.0 for value in values] if isinstance(values, list | tuple) else []
