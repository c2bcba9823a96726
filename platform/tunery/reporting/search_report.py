"""The search in a report: scatter plots, parallel coordinates, parameter importance, Pareto front, learning curves and
the table of trials."""

from __future__ import annotations

from collections.abc import Mapping

from tunery.events.formatting import measure, overrides_text, plain, short_paths
from tunery.events.leaderboard import column_names, constraint_text, leaderboard, origin, parameters
from tunery.events.run_state import SearchState, TrialState
from tunery.reporting.charts import Dot, Series, line_chart, scatter_chart
from tunery.reporting.funnel_timeline import Bar, bars_chart
from tunery.reporting.importance import Importance, importances, too_few_trials
from tunery.reporting.parallel_coordinates import Line, parallel_chart, parameter_axis
from tunery.reporting.pareto import pareto_chart
from tunery.reporting.tables import Figure, Table, table

MAX_LINES = 300
"""Trials in the parallel coordinates chart: the best ones."""


def scatters(search: SearchState) -> list[Figure]:
    """A scatter plot of the metric over each parameter."""
    names = short_paths(parameters(search))
    figures = [_scatter(search, path, names) for path in parameters(search)]
    return [figure for figure in figures if figure.svg]


def _scatter(search: SearchState, path: str, names: Mapping[str, str]) -> Figure:
    trials = [trial for trial in search.originals if trial.value is not None and path in trial.final_values]
    if not trials:
        return Figure(names[path], "")
    best = search.best
    axis = parameter_axis(names[path], [trial.final_values[path] for trial in trials], search.space.get(path, ""))
    dots = [
        Dot(
            axis.categories.index(plain(trial.final_values[path]))
            if axis.categories
            else float(trial.final_values[path]),
            trial.value,
            _tip(trial, names),
            "best" if trial is best else trial.status,
        )
        for trial in trials
        if trial.value is not None
    ]
    return Figure(names[path], scatter_chart(dots, axis, _value_label(search)), small=True)


def parallel(search: SearchState) -> Figure | None:
    """Parallel coordinates: parameters, then the metric; None with fewer than two parameters or trials."""
    trials = [trial for trial in search.ranked if trial.value is not None][:MAX_LINES]
    paths = [path for path in parameters(search) if any(path in trial.final_values for trial in trials)]
    names = short_paths(parameters(search))
    if len(paths) < 2 or len(trials) < 2:
        return None
    axes = [
        parameter_axis(
            names[path],
            [trial.final_values[path] for trial in trials if path in trial.final_values],
            search.space.get(path, ""),
        )
        for path in paths
    ]
    best = search.best
    # "uniform": the metric's axis is continuous, however few distinct values it has.
    axes.append(parameter_axis(_value_label(search), [trial.value for trial in trials], "uniform"))
    lines = [
        Line([*(trial.final_values.get(path) for path in paths), trial.value], _style(trial, best), _tip(trial, names))
        for trial in trials
    ]
    chart = parallel_chart(axes, lines)
    keys = [("best-line-key", "best"), ("quiet-key", "other trials")]
    keys += [("early-key", "stopped early")] if any(line.style == "stopped" for line in lines) else []
    gaps = any(None in line.values for line in lines)
    note = f"{'lower' if search.mode == 'min' else 'higher'} is better"
    note += "; lines have gaps where a trial does not have the field" if gaps else ""
    note += f"; the best {len(trials)} of {len(search.originals)} trials" if len(trials) < len(search.originals) else ""
    return Figure("parallel coordinates", chart, note, keys, wide=True) if chart else None


def _style(trial: TrialState, best: TrialState | None) -> str:
    return "best" if trial is best else "stopped" if trial.status == "stopped" else "quiet"


def pareto(search: SearchState) -> Figure | None:
    """Pareto front of the first two objectives; None with a single objective."""
    if len(search.objectives) < 2:
        return None
    (x, x_mode), (y, y_mode) = search.objectives[:2]
    names, best = column_names(search), search.best
    trials = [trial for trial in search.originals if trial.status == "done" and {x, y} <= trial.values.keys()]
    dots = [
        Dot(trial.values[x], trial.values[y], _tip(trial, names), _dot_style(search, trial, best)) for trial in trials
    ]
    labels = [f"{names.get(name, name)} ({_better(mode)} is better)" for name, mode in ((x, x_mode), (y, y_mode))]
    chart = pareto_chart(dots, (labels[0], labels[1]), higher=x_mode == "max", joined=len(search.objectives) == 2)
    keys = [
        ("best-dot", "best by the first metric"),
        ("front-dot", "on the Pareto front"),
        ("done-dot", "other trials"),
    ]
    if search.constraints and any(not trial.feasible for trial in trials):
        bounds = " or ".join(
            constraint_text(bound, names.get(bound.metric, bound.metric)) for bound in search.constraints
        )
        keys.append(("infeasible-dot", f"violates {bounds}"))
    further = [names.get(name, name) for name, _ in search.objectives[2:]]
    note = f"further objectives of the front: {', '.join(further)}" if further else ""
    return Figure("Pareto front", chart, note, keys) if chart else None


def _dot_style(search: SearchState, trial: TrialState, best: TrialState | None) -> str:
    front = " front" if trial.name in search.pareto_front else ""
    return ("best" if trial is best else "done" if trial.feasible else "infeasible") + front


def importance(search: SearchState) -> list[Figure]:
    """Parameter importance for each objective; only a note if there are too few trials."""
    paths = parameters(search)
    if not paths or search.best is None:
        return []
    if note := too_few_trials(search):
        return [Figure("parameter importance", "", note)]
    names = short_paths(paths)
    metrics = [search.value_name] if len(search.objectives) == 1 else [metric for metric, _ in search.objectives]
    figures = []
    for metric in metrics:
        result = importances(search, paths, metric)
        completed = max(one.trials for one in result)
        bars = [
            Bar(names[one.path], one.share, _importance_note(one, completed), not one.significant)
            for one in result
            if one.share is not None
        ]
        skipped = [f"{names[one.path]} ({one.trials} trials)" for one in result if one.share is None]
        note = f"share of the rank variance over {completed} trials that each field explains alone; correlated fields "
        note += "share what they explain"
        note += f"; too few trials for {', '.join(skipped)}" if skipped else ""
        keys = [("good", "significant (p < 0.05)")] if any(not bar.quiet for bar in bars) else []
        keys += [("not-significant", "not significant")] if any(bar.quiet for bar in bars) else []
        label = column_names(search).get(metric, metric)
        figures.append(Figure(f"parameter importance for {label}", bars_chart(bars), note, keys))
    return figures


def _importance_note(one: Importance, completed: int) -> str:
    return f"of {one.trials} trials that have it" if one.trials < completed else ""


def trial_curves(search: SearchState) -> Figure | None:
    """Learning curve of each trial, with the best trial highlighted."""
    names = short_paths(parameters(search))
    series = []
    for trial in search.originals:
        points = [(float(step), value) for step, value in search.curve(trial)]
        is_best = trial is search.best
        label, style = (trial.name, "best") if is_best else ("", "quiet")
        series.append(Series(label, points, 0, style, _tip(trial, names)))
    chart = line_chart(series, "steps", "held-out loss" if search.metric.endswith("loss") else search.metric)
    keys = [("best-key", "best"), ("quiet-key", "others")]
    return Figure("learning curves of the trials", chart, keys=keys) if chart else None


def trials_table(search: SearchState) -> Table | None:
    """The trials, best first, with the errors of failed trials."""
    if not search.trials:
        return None
    board = leaderboard(search, times=True)
    return table(board.columns, board.rows, highlighted=board.best_row)


def summary(search: SearchState) -> str:
    """The search in one line: objectives, constraints, progress, scheduler and concurrency."""
    ended = search.count("done", "stopped", "failed")
    replicates = len(search.trials) - len(search.originals)
    names = column_names(search)
    parts = [f"{search.metric or 'value'} ({_better(search.mode)} is better)"]
    for objective in search.further_objectives:
        operator = "and" if objective.weight is None else f"plus {objective.weight:g} times"
        parts.append(f"{operator} {objective.metric} ({_better(objective.mode)} is better)")
    parts += [constraint_text(bound, names.get(bound.metric, bound.metric)) for bound in search.constraints]
    parts += [f"{ended} of {search.total} trials" + (f", {replicates} of them replicates" if replicates else "")]
    parts += [f"{search.count(status)} {status}" for status in ("stopped", "failed", "running") if search.count(status)]
    parts += [f"scheduler {search.scheduler}"] if search.scheduler not in ("", "none") else []
    parts += (
        [f"{search.max_concurrent} at a time" + (f" ({search.reason})" if search.reason else "")]
        if search.max_concurrent
        else []
    )
    return " · ".join(parts)


def _better(mode: str) -> str:
    return "higher" if mode == "max" else "lower"


def _value_label(search: SearchState) -> str:
    return search.value_name.rpartition(".")[2] or "value"


def _tip(trial: TrialState, names: Mapping[str, str]) -> str:
    value = measure(trial.value) if trial.value is not None else "no value"
    lines = [f"{trial.name}: {value} ({trial.status})", *overrides_text(trial.overrides, names).split("  ")]
    return "\n".join([*lines, *([origin(trial)] if origin(trial) else [])])
