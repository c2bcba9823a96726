"""Question, versions and results of a run in the report: summary tables, and evaluations of all models by set."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from tunery.events.formatting import as_number, count, plain, strings
from tunery.events.run_state import RunState
from tunery.events.stage_summary import mappings_in
from tunery.reporting.tables import Table, table
from tunery.spec import STAGE_KINDS
from tunery.spec.stage_kinds import Direction


def comparisons(state: RunState) -> list[tuple[str, Table]]:
    """The run's summary tables, as (title, table)."""
    return [
        (title, table(summary["columns"], summary["rows"], notes=summary.get("notes") or []))
        for title, summary in state.comparisons.items()
        if summary["columns"] and summary["rows"]
    ]


def leaderboard(state: RunState) -> Table | None:
    """Evaluation metrics as a table of models by sets, with the best value of each column marked."""
    kinds_and_results = _distinct_results(state)
    results = [result for _, result in kinds_and_results]
    models = list(dict.fromkeys(str(result.get("model", "")) for result in results))
    sets = list(dict.fromkeys(str(result.get("set", "")) for result in results))
    values: dict[tuple[str, str, str], object] = {}
    directions: dict[str, Direction] = {}
    for kind, result in kinds_and_results:
        for key, value in result.items():
            if key not in ("model", "set", "tokens", "rows") and as_number(value) is not None:
                values[str(result.get("model", "")), str(result.get("set", "")), str(key)] = value
                # The kind may be of a plugin that is not installed here.
                if kind in STAGE_KINDS and (direction := STAGE_KINDS[kind].direction(key)) is not None:
                    directions[key] = direction
    metrics = list(dict.fromkeys(key for _, _, key in values))
    columns = [(name, key) for name in sets for key in metrics if any((model, name, key) in values for model in models)]
    if not columns:
        return None
    rows = [[model, *(values.get((model, name, key)) for name, key in columns)] for model in models]
    return table(
        ["model", *(f"{name} {key.replace('_', ' ')}" for name, key in columns)],
        rows,
        best={index: directions[key] for index, (_, key) in enumerate(columns, start=1) if key in directions},
        notes=_set_sizes(results),
    )


def _distinct_results(state: RunState) -> list[tuple[str, Mapping[str, Any]]]:
    """Results of all evaluations, with the kind of their stage. If two stages of a kind have different results for a
    model of the same name (such as the file's values and the best trial's), the later result's label includes its
    stage."""
    results: dict[tuple[str, str, str], Mapping[str, Any]] = {}
    for stage in state.stages.values():
        for result in mappings_in(stage.facts.get("results")):
            model, name = str(result.get("model", "")), str(result.get("set", ""))
            earlier = results.setdefault((stage.kind, model, name), result)
            if earlier != result:
                label = f"{model}, {stage.name}"
                results[stage.kind, label, name] = {**result, "model": label}
    return [(kind, result) for (kind, _, _), result in results.items()]


def _set_sizes(results: list[Mapping[str, Any]]) -> list[str]:
    sizes: dict[str, str] = {}
    for result in results:
        rows, tokens = as_number(result.get("rows")), as_number(result.get("tokens"))
        parts = [f"{count(rows)} rows"] * (rows is not None) if rows is not None else []
        parts += [f"{count(tokens)} tokens"] if tokens is not None else []
        if parts:
            sizes.setdefault(str(result.get("set", "")), f"{result.get('set', '')}: {', '.join(parts)}")
    return ["; ".join(sizes.values())] if sizes else []


def opening_comment(text: str) -> list[str]:
    """Return the paragraphs of the comment at the top of an experiment file; the first one states its question."""
    lines = list(itertools.takewhile(lambda line: line.startswith("#"), text.splitlines()))
    groups = itertools.groupby((line.lstrip("#").strip() for line in lines), key=bool)
    return [" ".join(paragraph) for has_text, paragraph in groups if has_text]


def versions(state: RunState) -> list[tuple[str, str]]:
    return [(str(name), ", ".join(strings(value)) or plain(value)) for name, value in state.versions.items()]
