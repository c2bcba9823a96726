"""The search in a report: each parameter against the metric, all of them together, what matters how much, two metrics
against each other, the trials' curves, the table of trials."""

from __future__ import annotations

from collections.abc import Mapping

from tunery.events.formatting import measure, overrides_text, plain, short_paths
from tunery.events.leaderboard import bound_text, column_names, leaderboard, origin, parameters
from tunery.events.run_state import SearchState, TrialState
from tunery.reporting.charts import Dot, Series, line_chart, scatter_chart
from tunery.reporting.funnel_timeline import Bar, bars_chart
from tunery.reporting.importance import Importance, importances, too_few
from tunery.reporting.parallel_coordinates import Line, axis_of, parallel_chart
from tunery.reporting.pareto import pareto_chart
from tunery.reporting.tables import Figure, Table, table

MOST_LINES = 300
"""Trials in one chart of parallel coordinates, the best ones."""


def scatters(search: SearchState) -> list[Figure]:
    """One small chart for each parameter."""
    names = short_paths(parameters(search))
    figures = [_scatter(search, path, names) for path in parameters(search)]
    return [figure for figure in figures if figure.svg]


def _scatter(search: SearchState, path: str, names: Mapping[str, str]) -> Figure:
    shown = [trial for trial in search.own if trial.value is not None and path in trial.present]
    if not shown:
        return Figure(names[path], "")
    best = search.best
    axis = axis_of(names[path], [trial.present[path] for trial in shown], search.space.get(path, ""))
    dots = [
        Dot(
            axis.categories.index(plain(trial.present[path])) if axis.categories else float(trial.present[path]),
            trial.value,
            _tip(trial, names),
            "best" if trial is best else trial.status,
        )
        for trial in shown
        if trial.value is not None
    ]
    return Figure(names[path], scatter_chart(dots, axis, _value_label(search)), small=True)


def parallel(search: SearchState) -> Figure | None:
    """Every trial as a line over the parameters to the metric; None with fewer than two parameters or trials."""
    shown = [trial for trial in search.ranked if trial.value is not None][:MOST_LINES]
    paths = [path for path in parameters(search) if any(path in trial.present for trial in shown)]
    names = short_paths(parameters(search))
    if len(paths) < 2 or len(shown) < 2:
        return None
    axes = [
        axis_of(
            names[path],
            [trial.present[path] for trial in shown if path in trial.present],
            search.space.get(path, ""),
        )
        for path in paths
    ]
    best = search.best
    # Whatever few values it has: the metric is a number, and not one of several words.
    axes.append(axis_of(_value_label(search), [trial.value for trial in shown], "uniform"))
    lines = [
        Line([*(trial.present.get(path) for path in paths), trial.value], _style(trial, best), _tip(trial, names))
        for trial in shown
    ]
    drawn = parallel_chart(axes, lines)
    keys = [("best-line-key", "best"), ("quiet-key", "other trials")]
    keys += [("early-key", "stopped early")] if any(line.style == "stopped" for line in lines) else []
    gaps = any(None in line.values for line in lines)
    said = f"{'lower' if search.mode == 'min' else 'higher'} is better"
    said += "; a line is interrupted where a trial has no such field" if gaps else ""
    said += f"; the best {len(shown)} of {len(search.own)}" if len(shown) < len(search.own) else ""
    return Figure("all parameters together", drawn, said, keys, wide=True) if drawn else None


def _style(trial: TrialState, best: TrialState | None) -> str:
    return "best" if trial is best else "stopped" if trial.status == "stopped" else "quiet"


def pareto(search: SearchState) -> Figure | None:
    """The first two metrics that are optimised apart; None with one."""
    if len(search.objectives) < 2:
        return None
    (x, x_mode), (y, y_mode) = search.objectives[:2]
    names, best = column_names(search), search.best
    shown = [trial for trial in search.own if trial.status == "done" and {x, y} <= trial.values.keys()]
    dots = [
        Dot(trial.values[x], trial.values[y], _tip(trial, names), _dot_style(search, trial, best)) for trial in shown
    ]
    labels = [f"{names.get(name, name)} ({_better(mode)} is better)" for name, mode in ((x, x_mode), (y, y_mode))]
    drawn = pareto_chart(dots, (labels[0], labels[1]), higher=x_mode == "max", joined=len(search.objectives) == 2)
    keys = [
        ("best-dot", "best by the first metric"),
        ("front-dot", "on the Pareto front"),
        ("done-dot", "other trials"),
    ]
    if search.bounds and any(not trial.feasible for trial in shown):
        bounds = " or ".join(bound_text(bound, names.get(bound.metric, bound.metric)) for bound in search.bounds)
        keys.append(("broken-dot", f"breaks {bounds}"))
    further = [names.get(name, name) for name, _ in search.objectives[2:]]
    said = f"the front is also of {', '.join(further)}" if further else ""
    return Figure("Pareto front", drawn, said, keys) if drawn else None


def _dot_style(search: SearchState, trial: TrialState, best: TrialState | None) -> str:
    front = " front" if trial.name in search.front else ""
    return ("best" if trial is best else "done" if trial.feasible else "broken") + front


def importance(search: SearchState) -> list[Figure]:
    """What each metric that is optimised depends on, a figure each; a sentence where there are too few trials."""
    paths = parameters(search)
    if not paths or search.best is None:
        return []
    if said := too_few(search):
        return [Figure("what the metric depends on", "", said)]
    names = short_paths(paths)
    metrics = [search.value_name] if len(search.objectives) == 1 else [metric for metric, _ in search.objectives]
    figures = []
    for metric in metrics:
        found = importances(search, paths, metric)
        ended = max(one.trials for one in found)
        bars = [
            Bar(names[one.path], one.share, _importance_note(one, ended), not one.beyond_chance)
            for one in found
            if one.share is not None
        ]
        unsaid = [f"{names[one.path]} ({one.trials} trials)" for one in found if one.share is None]
        said = f"share of the differences in rank among {ended} trials that each field explains by itself; of fields "
        said += "that happened to go together each has the other's share too"
        said += f"; too few to say of {', '.join(unsaid)}" if unsaid else ""
        keys = [("good", "more than chance gives")] if any(not bar.quiet for bar in bars) else []
        keys += [("by-chance", "may be chance")] if any(bar.quiet for bar in bars) else []
        label = column_names(search).get(metric, metric)
        figures.append(Figure(f"what {label} depends on", bars_chart(bars), said, keys))
    return figures


def _importance_note(one: Importance, ended: int) -> str:
    return f"of {one.trials} trials that have it" if one.trials < ended else ""


def trial_curves(search: SearchState) -> Figure | None:
    """How each trial came to its value: grey, with the best one drawn over them."""
    names = short_paths(parameters(search))
    series, winner = [], search.best
    for trial in search.own:
        points = [(float(step), value) for step, value in search.curve(trial)]
        best = trial is winner
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
    board = leaderboard(search, times=True)
    drawn = table(board.columns, board.rows, chosen=board.chosen)
    numeric = [flush or name == "time" for flush, name in zip(drawn.numeric, drawn.columns, strict=True)]
    return Table(drawn.columns, numeric, drawn.rows, [], board.chosen)


def summary(search: SearchState) -> str:
    """The search in one line: what was searched for, how, and how far it came."""
    ended = search.count("done", "stopped", "failed")
    again = len(search.trials) - len(search.own)
    names = column_names(search)
    parts = [f"{search.metric or 'value'} ({_better(search.mode)} is better)"]
    for item in search.also:
        how = "and" if item.weight is None else f"plus {item.weight:g} times"
        parts.append(f"{how} {item.metric} ({_better(item.mode)} is better)")
    parts += [bound_text(bound, names.get(bound.metric, bound.metric)) for bound in search.bounds]
    parts += [f"{ended} of {search.total} trials" + (f", {again} of them other seeds" if again else "")]
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
