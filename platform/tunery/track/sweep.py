"""The search in a report: each parameter against the metric, the trials' curves, the table of trials."""

from __future__ import annotations

from tunery.track.charts import Axis, Dot, Series, line_chart, scatter_chart
from tunery.track.sheets import Figure, Table, table
from tunery.track.snapshot import SearchState, TrialState
from tunery.track.wording import as_number, duration, measure, overrides_text, plain, short_paths

MOST_CATEGORIES = 6
"""A numeric parameter with more values than this, or drawn from a range, gets a continuous axis."""


def parameters(search: SearchState) -> list[str]:
    """The searched fields, in the order of the space; the trials' own where no space was told."""
    told = [path for trial in search.trials.values() for path in trial.overrides]
    return list(dict.fromkeys([*search.space, *told]))


def scatters(search: SearchState) -> list[Figure]:
    """One small chart for each parameter."""
    names = short_paths(parameters(search))
    figures = [_scatter(search, path, names) for path in parameters(search)]
    return [figure for figure in figures if figure.svg]


def _scatter(search: SearchState, path: str, names: dict[str, str]) -> Figure:
    shown = [trial for trial in search.trials.values() if trial.value is not None and path in trial.overrides]
    if not shown:
        return Figure(names[path], "")
    axis = _axis(search, path, names[path], [trial.overrides[path] for trial in shown])
    dots = [
        Dot(
            axis.categories.index(plain(trial.overrides[path])) if axis.categories else float(trial.overrides[path]),
            trial.value,
            _tip(trial, names),
            "best" if trial is search.best else trial.status,
        )
        for trial in shown
        if trial.value is not None
    ]
    return Figure(names[path], scatter_chart(dots, axis, search.metric.rpartition(".")[2] or "value"), small=True)


def _axis(search: SearchState, path: str, name: str, values: list[object]) -> Axis:
    numbers = [number for value in values if (number := as_number(value)) is not None]
    ranged = "uniform" in search.space.get(path, "")
    if len(numbers) == len(values) and (ranged or len(set(numbers)) > MOST_CATEGORIES):
        wide = min(numbers) > 0 and max(numbers) / min(numbers) > 30
        return Axis(name, log=min(numbers) > 0 and (wide or "log" in search.space.get(path, "")))
    distinct = {plain(value): as_number(value) for value in values}
    return Axis(
        name,
        categories=sorted(distinct, key=lambda said: (distinct[said] is None, distinct[said] or 0.0, said)),
    )


def trial_curves(search: SearchState) -> Figure | None:
    """How each trial came to its value: grey, with the best one drawn over them."""
    names = short_paths(parameters(search))
    series = []
    for trial in search.trials.values():
        points = [(float(step), value) for step, value in search.curve(trial)]
        best = trial is search.best
        series.append(Series(trial.name if best else "", points, 0, "best" if best else "quiet", _tip(trial, names)))
    drawn = line_chart(series, "steps", "held-out loss" if search.metric.endswith("loss") else search.metric)
    return (
        Figure("learning curves of the trials", drawn, keys=[("best-key", "best"), ("quiet-key", "others")])
        if drawn
        else None
    )


def trials_table(search: SearchState) -> Table | None:
    """Best first; a failed trial says why."""
    if not search.trials:
        return None
    paths, ranked = parameters(search), search.ranked
    names = short_paths(paths)
    errors = any(trial.error for trial in ranked)
    columns = [
        "trial",
        "state",
        search.metric or "value",
        *(names[path] for path in paths),
        "time",
        *(["why"] if errors else []),
    ]
    rows = [
        [
            trial.name,
            trial.status,
            trial.value,
            *(trial.overrides.get(path) for path in paths),
            duration(trial.seconds) if trial.seconds is not None else None,
            *([trial.error.splitlines()[0] if trial.error else None] if errors else []),
        ]
        for trial in ranked
    ]
    chosen = next((index for index, trial in enumerate(ranked) if trial is search.best), None)
    drawn = table(columns, rows, chosen=chosen)
    time_column = 3 + len(paths)
    return Table(
        drawn.columns,
        [numeric or index == time_column for index, numeric in enumerate(drawn.numeric)],
        drawn.rows,
        [],
        chosen,
    )


def summary(search: SearchState) -> str:
    """The search in one line: what was searched for, how, and how far it came."""
    ended = search.count("done", "stopped", "failed")
    parts = [
        f"{search.metric or 'value'} ({'lower' if search.mode == 'min' else 'higher'} is better)",
        f"{ended} of {search.total} trials",
    ]
    parts += [f"{search.count(status)} {status}" for status in ("stopped", "failed", "running") if search.count(status)]
    parts += [f"scheduler {search.scheduler}"] if search.scheduler else []
    parts += (
        [f"{search.max_concurrent} at a time" + (f" ({search.reason})" if search.reason else "")]
        if search.max_concurrent
        else []
    )
    return " · ".join(parts)


def best_line(search: SearchState) -> str:
    best = search.best
    if best is None or best.value is None:
        return ""
    return f"{best.name}: {measure(best.value)} with {overrides_text(best.overrides).replace('  ', ', ')}"


def _tip(trial: TrialState, names: dict[str, str]) -> str:
    value = measure(trial.value) if trial.value is not None else "no value"
    return f"{trial.name}: {value} ({trial.status})\n" + overrides_text(trial.overrides, names).replace("  ", "\n")
