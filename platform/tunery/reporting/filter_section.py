"""Filters in the report: score against score, what each rule did, rows on either side of it, and the quarantine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tunery.events.formatting import as_number, count, measure, plain
from tunery.events.run_state import RunState, StageState
from tunery.events.stage_summary import listed
from tunery.reporting.heatmap import heat_chart
from tunery.reporting.tables import Figure, Table, table


@dataclass(frozen=True)
class Shown:
    """A row as the report shows it."""

    kept: bool
    score: str
    text: str
    planted: str


@dataclass(frozen=True)
class Decile:
    title: str
    said: str
    percent: int
    """Kept."""
    rows: list[Shown]
    mixed: bool
    """The cut goes through it."""


@dataclass(frozen=True)
class Filter:
    name: str
    tables: list[Table]
    """What each rule did; and how well they found planted rows, where those are known."""
    score: str
    deciles: list[Decile]


def auc_tables(state: RunState) -> list[tuple[str, Table]]:
    """For each score stage whose rows are known to be damaged or not: every score against every kind of damage."""
    found = []
    for stage in state.stages.values():
        scores = _scores(stage)
        kinds = sorted({str(kind) for told in scores.values() for kind in _mapping(told.get("auc_by_kind"))})
        rows = [
            [name, as_number(told.get("auc")), *(as_number(_mapping(told.get("auc_by_kind")).get(k)) for k in kinds)]
            for name, told in scores.items()
            if as_number(told.get("auc")) is not None
        ]
        if rows:
            best = dict.fromkeys(range(1, len(kinds) + 2), "highest")
            notes = ["the chance that a damaged row scores worse than an intact one: 0.5 is chance, 1 is always"]
            found.append((stage.name, table(["score", "all damage", *kinds], rows, notes=notes, best=best)))
    return found


def heat_figures(state: RunState) -> list[Figure]:
    """Score against score, for the pairs that the score stages counted."""
    figures = []
    for stage in state.stages.values():
        for pair in listed(stage.facts.get("pairs")):
            x, y = str(pair.get("x")), str(pair.get("y"))
            edges = [_numbers(pair.get(key)) for key in ("x_edges", "y_edges")]
            counts = [_numbers(row) for row in pair.get("counts") or []]
            cuts = (_cuts(state, stage, x), _cuts(state, stage, y))
            drawn = heat_chart(edges[0], edges[1], counts, (x, y), cuts)
            if drawn:
                said = "dashed: the cuts" if any(cuts) else ""
                figures.append(Figure(f"{x} and {y} ({stage.name})", drawn, said))
    return figures


def cuts_of(rule: Mapping[str, Any]) -> list[float]:
    """Where a rule cuts: a range at both ends. Logs of older runs know of one cut."""
    listed_cuts = rule.get("cuts")
    given = listed_cuts if isinstance(listed_cuts, list | tuple) and listed_cuts else [rule.get("cut")]
    return [value for cut in given if (value := as_number(cut)) is not None]


def goes_back(state: RunState, stage: StageState, to: StageState) -> bool:
    """Whether `stage` reads, directly or through others, what `to` made. Unknown inputs don't rule it out."""
    open_names, seen = list(stage.inputs), {stage.name}
    if not open_names:
        return True
    while open_names:
        name = open_names.pop()
        if name == to.name:
            return True
        if name not in seen and name in state.stages:
            seen.add(name)
            open_names += state.stages[name].inputs
    return False


def _cuts(state: RunState, scored: StageState, score: str) -> list[float]:
    return [
        cut
        for stage in state.stages.values()
        if goes_back(state, stage, scored)
        for rule in listed(stage.facts.get("rules"))
        if rule.get("score") == score
        for cut in cuts_of(rule)
    ]


def filters(state: RunState) -> list[Filter]:
    """What each select stage did, with rows of every decile of its first rule's score."""
    found = []
    for stage in state.stages.values():
        rules, samples = listed(stage.facts.get("rules")), stage.facts.get("samples")
        if stage.kind != "select" or not isinstance(samples, Mapping):
            continue
        deciles = [_decile(told) for told in listed(samples.get("deciles"))]
        tables = [*([_rules(stage, rules)] if rules else []), *_diversity(stage), *_quality(stage)]
        if tables:
            found.append(Filter(stage.name, tables, plain(samples.get("score")), deciles))
    return found


def _rules(stage: StageState, rules: list[Mapping[str, Any]]) -> Table:
    rows = [
        [
            plain(rule.get("rule")),
            " and ".join(_number(cut) for cut in cuts_of(rule)) or "none",
            as_number(rule.get("passed")),
            as_number(rule.get("dropped")),
        ]
        for rule in rules
    ]
    every = stage.facts.get("combine") != "any"
    notes = []
    if len(rules) > 1:
        notes.append(
            "a row counts for the first rule that dropped it" if every else "a row passes when any rule keeps it"
        )
    return table(["rule", "cut", "passes by itself", "dropped" if every else "would drop"], rows, notes=notes)


def _diversity(stage: StageState) -> list[Table]:
    """The chosen rows and as many at random: how near they come to all rows among which they were chosen."""
    told = _mapping(stage.facts.get("diverse"))
    rows = [
        [label, as_number(cover.get("radius")), as_number(cover.get("similarity"))]
        for label, cover in (
            (plain(told.get("rule")), _mapping(told.get("cover"))),
            ("as many at random", _mapping(told.get("random"))),
        )
        if cover
    ]
    if not rows:
        return []
    chance = _mapping(told.get("by_chance"))
    notes = [
        f"{count(as_number(told.get('kept')) or 0)} of {count(as_number(told.get('candidates')) or 0)} rows, measured "
        f"on {count(as_number(told.get('compared')) or 0)} of them",
        "radius: the distance from the worst covered row to the nearest kept one; similarity: the mean cosine to it",
    ]
    median, high = as_number(chance.get("median")), as_number(chance.get("high"))
    if median is not None and high is not None:
        often = f"two rows have a cosine of {measure(median)} by chance"
        notes.append(f"{often}, one pair in twenty of more than {measure(high)}")
    if (similar := as_number(told.get("too_similar"))) is not None:
        notes.append(f"{count(similar)} rows were too similar to a kept one (above {plain(told.get('similarity'))})")
    return [table(["choice", "radius", "similarity"], rows, notes=notes)]


def _quality(stage: StageState) -> list[Table]:
    truth = _mapping(stage.facts.get("planted"))
    measures = [as_number(truth.get(key)) for key in ("precision", "recall", "random_precision", "random_recall")]
    if measures[0] is None:
        return []
    rows = [["this filter", *measures[:2]], ["dropping as many at random", *measures[2:]]]
    by_kind = {str(kind): as_number(recall) for kind, recall in _mapping(truth.get("recall_by_kind")).items()}
    columns = ["planted rows", "precision", "recall", *(f"recall: {kind}" for kind in by_kind)]
    return [table(columns, [[*rows[0], *by_kind.values()], rows[1]])]


def _decile(told: Mapping[str, Any]) -> Decile:
    kept, dropped = as_number(told.get("kept")) or 0, as_number(told.get("dropped")) or 0
    low, high = as_number(told.get("low")), as_number(told.get("high"))
    ends = [_number(end) for end in dict.fromkeys((low, high)) if end is not None]
    rows = [
        Shown(verdict, _measured(row.get("score")), plain(row.get("text")), str(row.get("planted") or ""))
        for key, verdict in (("kept_rows", True), ("dropped_rows", False))
        for row in listed(told.get(key))
    ]
    said = f"{count(kept)} kept, {count(dropped)} dropped"
    percent = round(100 * kept / (kept + dropped)) if kept + dropped else 0
    return Decile(" – ".join(ends), said, percent, rows, bool(kept and dropped))


def _measured(value: object) -> str:
    number = as_number(value)
    return _number(number) if number is not None else ""


def _number(value: float) -> str:
    """Lengths and counts of rules without decimals."""
    return count(value) if float(value).is_integer() else measure(value)


def quarantines(state: RunState) -> list[tuple[str, list[Table]]]:
    """What could not be used, and why: of each dataset and score stage that put rows aside."""
    found = []
    for stage in state.stages.values():
        told = _mapping(stage.facts.get("quarantine"))
        reasons = [[row.get("reason"), row.get("rows")] for row in listed(told.get("reasons"))]
        first = [
            [f"{row.get('source')}:{row.get('line')}", row.get("reason"), row.get("text") or ""]
            for row in listed(told.get("first"))
        ]
        if reasons:
            total = as_number(stage.facts.get("quarantined")) or 0
            note = f"all {count(total)} are in quarantine.jsonl in {stage.artifact or 'the artifact'}"
            tables = [
                table(["reason", "rows"], reasons, notes=[note]),
                table(["first rows", "reason", "excerpt"], first),
            ]
            found.append((stage.name, tables))
    return found


def _scores(stage: StageState) -> dict[str, Mapping[str, Any]]:
    scores = _mapping(stage.facts.get("scores"))
    return {str(name): told for name, told in scores.items() if isinstance(told, Mapping)}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _numbers(values: object) -> list[float]:
    return [as_number(value) or 0.0 for value in values] if isinstance(values, list | tuple) else []
