"""Table of the trials of a search, best first, and a summary of the best trial and its uncertainty. No I/O."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tunery.events.formatting import (
    as_number,
    duration,
    measure,
    overrides_text,
    scheduled_values,
    short_paths,
    with_ci,
)
from tunery.events.run_state import ConstraintState, SearchState, TrialStanding, TrialState


@dataclass(frozen=True)
class Leaderboard:
    columns: list[str]
    rows: list[list[object]]
    optional: list[str]
    """Columns that a narrow table may omit, last one first. `winner_summary` repeats the values of the best trial."""
    best_row: int | None
    """Index of the row of the best trial."""


def parameters(search: SearchState) -> list[str]:
    """Return the paths of the searched fields in the order of the search space, then further fields that the trials
    override (all of them if the log has no search space)."""
    paths = [path for trial in search.originals for path in scheduled_values(trial.overrides)]
    return list(dict.fromkeys([*search.space, *paths]))


def leaderboard(search: SearchState, *, words: bool = False, times: bool = False) -> Leaderboard:
    """Return one row per trial, best first. Replicates have no row: they contribute the mean over seeds, half of its
    95% confidence interval, and the number of seeds to the row of the replicated trial. Empty columns are omitted, and
    the state if all trials are done.

    `words`: write column names with spaces instead of underscores. `times`: add the duration of each trial and the
    error of failed ones.
    """
    ranked = search.ranked
    names = column_names(search, words=words)
    all_standings = search.standings
    standings = [all_standings.get(trial.name) for trial in ranked]
    columns: list[tuple[str, Sequence[object]]] = [("trial", [trial.name for trial in ranked])]
    if {trial.status for trial in ranked} != {"done"}:
        columns.append(("state", [trial.status for trial in ranked]))
    measured = {metric: [trial.values.get(metric) for trial in ranked] for metric in search.metrics}
    measured[search.value_name] = [trial.value for trial in ranked]
    # The value that is optimized comes first, next to its mean over seeds.
    columns.append((names.get(search.value_name, search.value_name), measured.pop(search.value_name)))
    columns.append(("mean of seeds", [mean_text(standing) if standing else None for standing in standings]))
    columns.append(("seeds", [standing.seeds if standing else None for standing in standings]))
    columns += [(names[metric], values) for metric, values in measured.items()]
    columns.append(("violations", [", ".join(violations(search, trial, names)) or None for trial in ranked]))
    columns.append(("pareto_front", ["yes" if trial.name in search.pareto_front else None for trial in ranked]))
    fields = [names[path] for path in parameters(search)]
    values = [scheduled_values(trial.overrides) for trial in ranked]
    for path in parameters(search):
        columns.append((names[path], [row.get(path) for row in values]))
    learned = "tokens" if any(trial.tokens for trial in ranked) else "steps"
    columns.append((learned, [_whole(trial.tokens if learned == "tokens" else trial.steps) for trial in ranked]))
    columns.append(("origin", [origin(trial) or None for trial in ranked]))
    if times:
        seconds = [trial.seconds for trial in ranked]
        columns.append(("time", [None if value is None else duration(value) for value in seconds]))
        columns.append(("error", [trial.error.splitlines()[0] if trial.error else None for trial in ranked]))
    cells = [(name, column) for name, column in columns if any(cell is not None for cell in column)]
    best = search.best
    return Leaderboard(
        [name for name, _ in cells],
        [[column[index] for _, column in cells] for index in range(len(ranked))],
        [name for name in ("pareto_front", *fields, "seeds", "origin", learned) if name in dict(cells)],
        next((index for index, trial in enumerate(ranked) if trial is best), None),
    )


def column_names(search: SearchState, *, words: bool = False) -> dict[str, str]:
    """Map the paths of metrics and searched fields to their shortest unique suffixes."""
    names = short_paths([*search.metrics, *parameters(search)])
    return {path: name.replace("_", " ") if words else name for path, name in names.items()}


def origin(trial: TrialState) -> str:
    """Return the origin of a trial, such as 'replicate of NAME'; "" for a sampled trial."""
    match trial.origin:
        case "cloned" | "pbt_child" | "replicate":
            joined = "from" if trial.origin == "cloned" else "of"
            return f"{trial.origin} {joined} {trial.of}" if trial.of else trial.origin
        case "" | "sampled":
            return ""
        case other:
            return other


def violations(search: SearchState, trial: TrialState, names: dict[str, str] | None = None) -> list[str]:
    """Return the constraints that a finished trial violates: 'forgetting > 0.02'."""
    if trial.status != "done" or trial.feasible:
        return []
    broken = []
    for constraint in search.constraints:
        name, value = (names or {}).get(constraint.metric, constraint.metric), trial.values.get(constraint.metric)
        if value is None:
            broken.append(f"{name} unknown")
        elif constraint.high is not None and value > constraint.high:
            broken.append(f"{name} > {constraint.high:g}")
        elif constraint.low is not None and value < constraint.low:
            broken.append(f"{name} < {constraint.low:g}")
    return broken


def constraint_text(constraint: ConstraintState, name: str) -> str:
    """Format a constraint: 'forgetting ≤ 0.02'."""
    ends = [f"{sign} {end:g}" for sign, end in (("≥", constraint.low), ("≤", constraint.high)) if end is not None]
    return f"{name} {' and '.join(ends)}"


def mean_text(standing: TrialStanding) -> str:
    """Format mean ± half of the 95% confidence interval."""
    return with_ci(standing.mean, standing.ci_half_width)


def winner_summary(search: SearchState) -> list[str]:
    """Return lines that describe the best trial, trials that are statistically tied with it, violated constraints, the
    Pareto front, and why the search ended early."""
    best, lines = search.best, list[str]()
    if best is not None and best.value is not None:
        lines.append(_winner(search, best))
        if search.ties:
            standing = search.standings.get(best.name)
            seeds = f"{standing.seeds} seeds" if standing else "the seeds"
            lines.append(f"tied with {_listed(search.ties)}: not significantly different over {seeds}")
        names = column_names(search)
        if violated := violations(search, best, names):
            lines.append(f"no trial satisfies the constraints: {best.name} has {' and '.join(violated)}")
    if search.pareto_front:
        names = short_paths([metric for metric, _ in search.objectives])
        metrics = _listed(list(names.values()))
        members = _listed([trial.name for trial in search.ranked if trial.name in search.pareto_front])
        lines.append(f"Pareto front of {metrics}: {members}; no trial is better in one without being worse in another")
    if search.ended_by:
        lines.append(f"the search ended early: {search.ended_by}")
    return lines


def _winner(search: SearchState, best: TrialState) -> str:
    standing = search.standings.get(best.name)
    value = mean_text(standing) if standing else measure(best.value or 0.0)
    seeds = f"over {standing.seeds} seeds" if standing else "by one seed"
    name = search.value_name.rpartition(".")[2].replace("_", " ")
    values = scheduled_values(best.overrides)
    overrides = {path: values[path] for path in parameters(search) if path in values}
    given = overrides_text(overrides, column_names(search)).replace("  ", ", ")
    label = "best" if search.finished else "best so far"
    return f"{label}: {best.name}, {name} {value} {seeds}" + (f", with {given}" if given else "")


def _listed(names: Sequence[str], most: int = 6) -> str:
    """Join at most `most` names: 'a', 'a and b', 'a, b and c', 'a, b and 3 more'."""
    shown = [*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])]
    return " and ".join([", ".join(shown[:-1]), shown[-1]]) if len(shown) > 1 else "".join(shown)


def _whole(value: float | None) -> int | None:
    number = as_number(value)
    return round(number) if number is not None else None
