"""What a report shows of a run, by section: pure functions from the run's state to tables and figures.

A section for which the run has nothing (yet) is empty, and the page leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tunery.events.formatting import as_number, count, measure, plain, strings
from tunery.events.run_state import RunState, StageState
from tunery.events.stage_summary import listed, usable_rows
from tunery.reporting.charts import Cut, histogram_chart
from tunery.reporting.filter_section import cuts_of, goes_back
from tunery.reporting.funnel_timeline import Level, funnel_chart, lost_note
from tunery.reporting.tables import Figure, Table, table
from tunery.spec import TRAININGS

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "forgetting"})
HIGHER_IS_BETTER = frozenset({"accuracy", "f1", "auc", "win_rate", "reward"})


def comparisons(state: RunState) -> list[tuple[str, Table]]:
    """The result: the tables that the run ended with, under their titles."""
    return [
        (title, table(told["columns"], told["rows"], notes=told.get("notes") or []))
        for title, told in state.comparisons.items()
        if told["columns"] and told["rows"]
    ]


def leaderboard(state: RunState) -> Table | None:
    """Models by sets: each number that the evaluations gave, the best of a column marked."""
    results = _distinct_results(state)
    models = list(dict.fromkeys(str(result.get("model", "")) for result in results))
    sets = list(dict.fromkeys(str(result.get("set", "")) for result in results))
    values: dict[tuple[str, str, str], object] = {}
    for result in results:
        for key, value in result.items():
            if key not in ("model", "set", "tokens", "rows") and as_number(value) is not None:
                values[str(result.get("model", "")), str(result.get("set", "")), str(key)] = value
    measures = list(dict.fromkeys(key for _, _, key in values))
    columns = [
        (name, key) for name in sets for key in measures if any((model, name, key) in values for model in models)
    ]
    if not columns:
        return None
    best = {
        index: "lowest" if key in LOWER_IS_BETTER else "highest"
        for index, (_, key) in enumerate(columns, start=1)
        if key in LOWER_IS_BETTER | HIGHER_IS_BETTER
    }
    rows = [[model, *(values.get((model, name, key)) for name, key in columns)] for model in models]
    return table(
        ["model", *(f"{name} {key.replace('_', ' ')}" for name, key in columns)],
        rows,
        best=best,
        notes=_set_sizes(results),
    )


def _distinct_results(state: RunState) -> list[Mapping[str, Any]]:
    """Results of all evaluations. Where a later one of the same kind measured a model of the same name otherwise (the
    best trial's beside the file's own), that row names its stage too."""
    found: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for stage in state.stages.values():
        for result in listed(stage.facts.get("results")):
            model, name = str(result.get("model", "")), str(result.get("set", ""))
            earlier = found.setdefault((stage.kind, model, name), result)
            if earlier != result:
                label = f"{model}, {stage.name}"
                found[stage.kind, label, name] = {**result, "model": label}
    return list(found.values())


def _set_sizes(results: list[Mapping[str, Any]]) -> list[str]:
    sizes: dict[str, str] = {}
    for result in results:
        rows, tokens = as_number(result.get("rows")), as_number(result.get("tokens"))
        parts = [f"{count(rows)} rows"] * (rows is not None) if rows is not None else []
        parts += [f"{count(tokens)} tokens"] if tokens is not None else []
        if parts:
            sizes.setdefault(str(result.get("set", "")), f"{result.get('set', '')}: {', '.join(parts)}")
    return ["; ".join(sizes.values())] if sizes else []


def funnels(state: RunState) -> list[Figure]:
    """For each dataset: rows read, readable, and kept by each select that goes back to it."""
    figures = []
    for stage in state.stages.values():
        if stage.kind != "dataset" or as_number(stage.facts.get("rows")) is None:
            continue
        levels = list(funnel_levels(state.stages.values(), stage))
        planted = any(level.planted for level in levels)
        keys = [("good", "rows"), ("bad", "planted bad rows")] if planted else []
        source = str(stage.facts.get("source") or "")
        figures.append(Figure(stage.name, funnel_chart(levels), note=source, keys=keys))
    return figures


def funnel_levels(stages: Iterable[StageState], dataset: StageState) -> Iterator[Level]:
    """Rows read, readable, kept by each select of `stages` that goes back to the dataset, and used by each training
    that leaves out or truncates some; in the order of the file."""
    rows, quarantined = (
        as_number(dataset.facts.get("rows")) or 0,
        as_number(dataset.facts.get("quarantined")) or 0,
    )
    kinds = dataset.facts.get("planted")
    planted = sum(as_number(n) or 0 for kind, n in kinds.items() if kind) if isinstance(kinds, Mapping) else 0
    yield Level("read", rows + quarantined, planted=planted)
    if quarantined:
        yield Level("readable", rows, f"−{count(quarantined)} quarantined", planted)
    depths, sizes = {dataset.name: 0}, {dataset.name: (rows, planted)}
    for stage in stages:
        above = [name for name in stage.inputs if name in depths]
        before, kept = as_number(stage.facts.get("rows_in")), as_number(stage.facts.get("kept"))
        if stage.kind in TRAININGS:
            yield from _used_levels(stage, depths, sizes)
            continue
        # What comes out of `augment` are other rows, often more of them: they have no place in a funnel.
        other = stage.kind in ("augment", "evaluate", "win_rate")
        if not above or other or (before is None and kept is None):
            continue
        depths[stage.name] = depths[above[0]] + (kept is not None)
        sizes[stage.name] = sizes[above[0]]
        if kept is not None:
            truth = stage.facts.get("planted")
            total, dropped = (
                (as_number(truth.get(key)) or 0) if isinstance(truth, Mapping) else 0 for key in ("total", "dropped")
            )
            sizes[stage.name] = (kept, total - dropped)
            yield Level(
                f"kept by {stage.name}",
                kept,
                lost_note(before or kept, kept),
                total - dropped,
                depths[stage.name] - 1,
            )


def _used_levels(
    stage: StageState, depths: Mapping[str, int], sizes: Mapping[str, tuple[float, float]]
) -> Iterator[Level]:
    """Of each stage that gives a training its rows. None where all of them are used as they are, and where corruption
    was injected, since nobody counts how many of the unusable rows are corrupted."""
    mixture = stage.facts.get("mixture")
    data = next(iter(stage.inputs), "")  # `data` is the first field that names stages; others are models and eval_data
    facts = mixture if isinstance(mixture, Mapping) else {data: stage.facts}
    for name, own in facts.items():
        usable = usable_rows(own)
        if usable is None or not usable.reasons or sizes.get(name) != (usable.rows, 0):
            continue
        note = ", ".join(part for part in (lost_note(usable.rows, usable.used), usable.reasons) if part)
        yield Level(f"used by {stage.name}", usable.used, note, depth=depths[name])


def score_figures(state: RunState) -> list[Figure]:
    """For each score: its histogram, and the cuts of selects that use it."""
    figures = []
    for stage in state.stages.values():
        scores = stage.facts.get("scores")
        for name, score in scores.items() if isinstance(scores, Mapping) else ():
            if isinstance(score, Mapping):
                figures.append(_score_figure(state, stage, str(name), score))
    return [figure for figure in figures if figure.svg]


def _score_figure(state: RunState, stage: StageState, name: str, score: Mapping[str, Any]) -> Figure:
    histogram = score.get("histogram")
    drawn = histogram if isinstance(histogram, Mapping) else {}
    edges, counts, planted = (
        [as_number(v) or 0 for v in drawn.get(key) or []] for key in ("edges", "counts", "planted")
    )
    cuts = [
        Cut(value, f"{select.name}: {said}")
        for select in state.stages.values()
        if goes_back(state, select, stage)
        for rule in _rules(select, name)
        for value, said in zip(cuts_of(rule), _cut_labels(rule), strict=True)
    ]
    known = {cut.value for cut in cuts}
    for trial in state.search.trials.values() if state.search else ():
        for select in trial.stages.values():
            for rule in _rules(select, name):
                for value in cuts_of(rule):
                    if value not in known and len(cuts) < 5:
                        known.add(value)
                        cuts.append(Cut(value, f"{plain(rule.get('rule'))} (in trials)", quiet=True))
    auc, median = as_number(score.get("auc")), as_number(score.get("median"))
    said = [f"median {measure(median)}"] if median is not None else []
    said += [f"AUC {auc:.3f} at finding planted rows (0.5 is chance)"] if auc is not None else []
    keys = [("good", "rows as they were"), ("bad", "planted bad rows")] if any(planted) else []
    return Figure(
        f"{name} ({stage.name})",
        histogram_chart(edges, counts, planted, cuts, name),
        "; ".join(said),
        keys,
    )


def _cut_labels(rule: Mapping[str, Any]) -> list[str]:
    """One for each of the rule's cuts; a range says both of its ends already."""
    cuts, said = cuts_of(rule), plain(rule.get("rule"))
    return [said, "the range's other end"] if len(cuts) == 2 else [f"{said}, cut at {measure(cut)}" for cut in cuts]


def _rules(stage: StageState, score: str) -> list[Mapping[str, Any]]:
    return [rule for rule in listed(stage.facts.get("rules")) if rule.get("score") == score]


def question(text: str) -> str:
    """The comment lines that an experiment opens with: what it asks."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return "\n".join(lines).strip()


def versions(state: RunState) -> list[tuple[str, str]]:
    return [(str(name), ", ".join(strings(value)) or plain(value)) for name, value in state.versions.items()]
