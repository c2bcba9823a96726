"""Question, versions and results of a run in the report: summary tables, and evaluations of all models by set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.events.formatting import as_number, count, plain, strings
from tunery.events.run_state import RunState
from tunery.events.stage_summary import mappings_in
from tunery.reporting.tables import Table, table

LOWER_IS_BETTER = frozenset({"loss", "perplexity", "forgetting"})
HIGHER_IS_BETTER = frozenset({"accuracy", "f1", "auc", "win_rate", "reward"})


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
