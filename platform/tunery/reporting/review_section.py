"""Reviews in the report: agreement of a filter with the reviewer, overall and by stratum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.events.formatting import as_number, count, measure, share
from tunery.events.run_state import RunState
from tunery.events.stage_summary import mappings_in
from tunery.reporting.tables import Table, table

Facts = Mapping[str, Any]


def reviews(state: RunState) -> list[tuple[str, list[list[Table]]]]:
    """For each finished review stage its name and two columns of tables: confusion matrix and thresholds; strata."""
    result = []
    for stage in state.stages.values():
        agreement = stage.facts.get("agreement")
        if stage.kind == "review" and isinstance(agreement, Mapping):
            columns = [[_confusion_matrix(agreement, stage.facts), *_thresholds(stage.facts)], _strata(stage.facts)]
            result.append((stage.name, columns))
    return result


def _confusion_matrix(agreement: Facts, facts: Facts) -> Table:
    rows = [
        ["filter kept", agreement.get("both_keep"), agreement.get("only_filter_keeps")],
        ["filter dropped", agreement.get("only_person_keeps"), agreement.get("both_drop")],
    ]
    notes = []
    agreed, reviewed, kappa = (as_number(agreement.get(key)) for key in ("agreed", "reviewed", "kappa"))
    if agreed is not None and reviewed:
        note = f"agreement on {count(agreed)} of {count(reviewed)} rows, {share(agreed, reviewed)}"
        notes.append(note + (f"; Cohen's kappa {kappa:.2f} (0 is chance, 1 is perfect)" if kappa is not None else ""))
    sampled, answered = as_number(facts.get("sampled")), as_number(facts.get("sampled_decided"))
    if sampled is not None and answered is not None and answered < sampled:
        notes.append(f"{count(sampled - answered)} of {count(sampled)} sampled rows are not reviewed yet")
    return table(["", "reviewer keeps", "reviewer drops"], rows, notes=notes)


def _strata(facts: Facts) -> list[Table]:
    rows = [
        [stratum.get("name"), stratum.get("rows"), stratum.get("decided"), as_number(stratum.get("agreement"))]
        for stratum in mappings_in(facts.get("strata"))
    ]
    columns = ["filter decision, distance to threshold", "rows", "reviewed", "agreement"]
    return [table(columns, rows, notes=["rows farther from the threshold are not sampled"])] if rows else []


def _thresholds(facts: Facts) -> list[Table]:
    rows, notes = [], []
    for threshold in mappings_in(facts.get("thresholds")):
        names = ("current_threshold", "current_agreement", "threshold", "agreement")
        rows.append([threshold.get("score"), *(as_number(threshold.get(name)) for name in names)])
        low, high = as_number(threshold.get("lowest_reviewed")), as_number(threshold.get("highest_reviewed"))
        if low is not None and high is not None:
            edge = "; the best threshold is at its edge" if threshold.get("beyond_reviewed") else ""
            notes.append(f"reviewed range of {threshold.get('score')}: {measure(low)} to {measure(high)}{edge}")
    columns = ["score", "threshold", "agreement", "best threshold", "best agreement"]
    return [table(columns, rows, notes=notes)] if rows else []
