"""Sections of the report: pure functions from the run's state to tables and figures.

The page omits sections that are empty.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from tunery.events.formatting import as_number, count, measure, plain, strings
from tunery.events.run_state import RunState, StageState
from tunery.events.stage_summary import mappings_in, usable_rows
from tunery.reporting.charts import ThresholdLine, histogram_chart
from tunery.reporting.filter_section import is_downstream, rule_thresholds
from tunery.reporting.funnel_timeline import Level, funnel_chart, lost_note
from tunery.reporting.tables import Figure, Table, table
from tunery.spec import STAGE_KINDS, TRAINERS

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "forgetting"})
HIGHER_IS_BETTER = frozenset({"accuracy", "f1", "auc", "win_rate", "reward"})
MAX_THRESHOLDS = 5
"""Threshold lines in a histogram: thresholds of trials are added up to this number."""


def comparisons(state: RunState) -> list[tuple[str, Table]]:
    """The run's summary tables, as (title, table)."""
    return [
        (title, table(summary["columns"], summary["rows"], notes=summary.get("notes") or []))
        for title, summary in state.comparisons.items()
        if summary["columns"] and summary["rows"]
    ]


def leaderboard(state: RunState) -> Table | None:
    """Evaluation metrics as a table of models by sets, with the best value of each column marked."""
    results = _distinct_results(state)
    models = list(dict.fromkeys(str(result.get("model", "")) for result in results))
    sets = list(dict.fromkeys(str(result.get("set", "")) for result in results))
    values: dict[tuple[str, str, str], object] = {}
    for result in results:
        for key, value in result.items():
            if key not in ("model", "set", "tokens", "rows") and as_number(value) is not None:
                values[str(result.get("model", "")), str(result.get("set", "")), str(key)] = value
    metrics = list(dict.fromkeys(key for _, _, key in values))
    columns = [(name, key) for name in sets for key in metrics if any((model, name, key) in values for model in models)]
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
    """Results of all evaluations. If two stages of a kind have different results for a model of the same name (such as
    the file's values and the best trial's), the later result's label includes its stage."""
    results: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for stage in state.stages.values():
        for result in mappings_in(stage.facts.get("results")):
            model, name = str(result.get("model", "")), str(result.get("set", ""))
            earlier = results.setdefault((stage.kind, model, name), result)
            if earlier != result:
                label = f"{model}, {stage.name}"
                results[stage.kind, label, name] = {**result, "model": label}
    return list(results.values())


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
    """For each dataset: rows read, readable, and kept by each downstream select stage."""
    figures = []
    for stage in state.stages.values():
        if stage.kind != "dataset" or as_number(stage.facts.get("rows")) is None:
            continue
        levels = list(funnel_levels(state.stages.values(), stage))
        corrupted = any(level.corrupted for level in levels)
        keys = [("good", "rows"), ("bad", "corrupted rows")] if corrupted else []
        source = str(stage.facts.get("source") or "")
        figures.append(Figure(stage.name, funnel_chart(levels), note=source, keys=keys))
    return figures


def funnel_levels(stages: Iterable[StageState], dataset: StageState) -> Iterator[Level]:
    """Rows read, readable, kept by each downstream select of `stages`, and used by each training that skips or
    truncates some; in the order of the file."""
    rows, quarantined = (
        as_number(dataset.facts.get("rows")) or 0,
        as_number(dataset.facts.get("quarantined")) or 0,
    )
    kinds = dataset.facts.get("injected_corruption")
    corrupted = sum(as_number(n) or 0 for kind, n in kinds.items() if kind) if isinstance(kinds, Mapping) else 0
    yield Level("read", rows + quarantined, corrupted=corrupted)
    if quarantined:
        yield Level("readable", rows, f"−{count(quarantined)} quarantined", corrupted)
    depths, sizes = {dataset.name: 0}, {dataset.name: (rows, corrupted)}
    for stage in stages:
        parents = [name for name in stage.inputs if name in depths]
        before, kept = as_number(stage.facts.get("rows_in")), as_number(stage.facts.get("kept"))
        if stage.kind in TRAINERS:
            yield from _used_levels(stage, depths, sizes)
            continue
        # `augment` outputs new rows, often more than it reads, so it is no level of a funnel.
        kind = STAGE_KINDS.get(stage.kind)
        excluded = stage.kind == "augment" or (kind is not None and kind.config.output_type == "metrics")
        if not parents or excluded or (before is None and kept is None):
            continue
        depths[stage.name] = depths[parents[0]] + (kept is not None)
        sizes[stage.name] = sizes[parents[0]]
        if kept is not None:
            counts = stage.facts.get("injected_corruption")
            total, dropped = (
                (as_number(counts.get(key)) or 0) if isinstance(counts, Mapping) else 0 for key in ("total", "dropped")
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
    """A level for each stage whose rows the training reads. Omitted if all of its rows are used unchanged, and if
    corruption was injected: the number of corrupted rows among the unusable ones is not recorded."""
    mixture = stage.facts.get("mixture")
    data = next(iter(stage.inputs), "")  # `data` is the first field that names stages; others are models and eval_data
    facts = mixture if isinstance(mixture, Mapping) else {data: stage.facts}
    for name, stats in facts.items():
        usable = usable_rows(stats)
        if usable is None or not usable.reasons or sizes.get(name) != (usable.rows, 0):
            continue
        note = ", ".join(part for part in (lost_note(usable.rows, usable.used), usable.reasons) if part)
        yield Level(f"used by {stage.name}", usable.used, note, depth=depths[name])


def score_figures(state: RunState) -> list[Figure]:
    """For each score: its histogram with the thresholds of the select stages that use it."""
    figures = []
    for stage in state.stages.values():
        scores = stage.facts.get("scores")
        for name, score in scores.items() if isinstance(scores, Mapping) else ():
            if isinstance(score, Mapping):
                figures.append(_score_figure(state, stage, str(name), score))
    return [figure for figure in figures if figure.svg]


def _score_figure(state: RunState, stage: StageState, name: str, score: Mapping[str, Any]) -> Figure:
    value = score.get("histogram")
    histogram = value if isinstance(value, Mapping) else {}
    edges, counts, corrupted = (
        [as_number(v) or 0 for v in histogram.get(key) or []] for key in ("edges", "counts", "corrupted")
    )
    thresholds = [
        ThresholdLine(value, f"{select.name}: {label}")
        for select in state.stages.values()
        if is_downstream(state, select, stage)
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


def _rules(stage: StageState, score: str) -> list[Mapping[str, Any]]:
    return [rule for rule in mappings_in(stage.facts.get("rules")) if rule.get("score") == score]


def question(text: str) -> str:
    """The comment lines at the top of an experiment, which state its question."""
    lines: list[str] = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return "\n".join(lines).strip()


def versions(state: RunState) -> list[tuple[str, str]]:
    return [(str(name), ", ".join(strings(value)) or plain(value)) for name, value in state.versions.items()]
