"""Reviews in the report: how far a filter and the person who looked at it agree, and where they don't."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.events.formatting import as_number, count, measure, share
from tunery.events.run_state import RunState
from tunery.events.stage_summary import listed
from tunery.reporting.tables import Table, table

Facts = Mapping[str, Any]


def reviews(state: RunState) -> list[tuple[str, list[list[Table]]]]:
    """For each review stage that has ended: its name and two columns, of who decided what with the thresholds, and of
    where they agree."""
    found = []
    for stage in state.stages.values():
        agreed = stage.facts.get("agreement")
        if stage.kind == "review" and isinstance(agreed, Mapping):
            columns = [[_cases(agreed, stage.facts), *_thresholds(stage.facts)], _strata(stage.facts)]
            found.append((stage.name, columns))
    return found


def _cases(agreed: Facts, facts: Facts) -> Table:
    rows = [
        ["filter kept", agreed.get("both_keep"), agreed.get("only_filter_keeps")],
        ["filter dropped", agreed.get("only_person_keeps"), agreed.get("both_drop")],
    ]
    notes = []
    same, reviewed, kappa = (as_number(agreed.get(key)) for key in ("agreed", "reviewed", "kappa"))
    if same is not None and reviewed:
        said = f"the same on {count(same)} of {count(reviewed)} rows, {share(same, reviewed)}"
        notes.append(said + (f"; Cohen's kappa {kappa:.2f} (0 is chance, 1 is always)" if kappa is not None else ""))
    asked, answered = as_number(facts.get("asked")), as_number(facts.get("answered"))
    if asked is not None and answered is not None and answered < asked:
        notes.append(f"{count(asked - answered)} of {count(asked)} rows of the sample are not decided yet")
    return table(["", "person keeps", "person drops"], rows, notes=notes)


def _strata(facts: Facts) -> list[Table]:
    rows = [
        [stratum.get("name"), stratum.get("rows"), stratum.get("answered"), as_number(stratum.get("agreement"))]
        for stratum in listed(facts.get("strata"))
    ]
    columns = ["by the filter, from the cut", "rows there", "reviewed", "agreement"]
    return [table(columns, rows, notes=["nothing is known of rows farther away"])] if rows else []


def _thresholds(facts: Facts) -> list[Table]:
    rows, notes = [], []
    for found in listed(facts.get("thresholds")):
        names = ("cut", "agreement_at_cut", "threshold", "agreement")
        rows.append([found.get("score"), *(as_number(found.get(name)) for name in names)])
        low, high = as_number(found.get("lowest_reviewed")), as_number(found.get("highest_reviewed"))
        if low is not None and high is not None:
            end = "; the best threshold is at its end" if found.get("beyond_reviewed") else ""
            notes.append(f"reviewed: {found.get('score')} from {measure(low)} to {measure(high)}{end}")
    columns = ["score", "cut", "agreement there", "best threshold", "agreement there"]
    return [table(columns, rows, notes=notes)] if rows else []
