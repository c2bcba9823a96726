"""W&B tables and summary of a search, logged to the W&B run `comparison`.

leaderboard            a row per trial, best first: metrics, mean and half-width of the 95% interval, values
parallel_coordinates   a row per trial: values and metrics only, for W&B's chart of that name
importance             a row per searched field and metric (reporting/importance.py)
pareto_front           a row per trial of the front
funnel                 rows of each dataset and rows kept by each filter, in the best and in the worst trial
filter_samples         sample rows that the searched filters of these two trials kept and dropped
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tunery.events.formatting import overrides_text
from tunery.events.leaderboard import parameters, violations
from tunery.events.run_state import RunState, SearchState, StageState, TrialStanding, TrialState
from tunery.events.stage_summary import mappings_in
from tunery.reporting.funnel_section import funnel_levels
from tunery.reporting.importance import importances, too_few_trials
from tunery.reporting.wandb_values import HistoryValue, WandbTable, table


def search_tables(state: RunState, log_texts: bool) -> dict[str, HistoryValue]:
    """All tables of the search that have a row; `filter_samples` only with `log_texts`."""
    search = state.search
    if search is None or not search.trials:
        return {}
    tables = {
        "leaderboard": leaderboard_table(search),
        "parallel_coordinates": parallel_table(search),
        "importance": importance_table(search),
        "pareto_front": front_table(search),
        "funnel": funnel_table(state, search),
        **({"filter_samples": samples_table(search)} if log_texts else {}),
    }
    return {name: table for name, table in tables.items() if table.rows}


def search_summary(search: SearchState) -> dict[str, Any]:
    """Entries of the W&B summary, under `search.`."""
    summary: dict[str, Any] = {"trials": {state: search.count(state) for state in ("done", "stopped", "failed")}}
    summary |= {
        "ended_by": search.ended_by or None,
        "ties": search.ties or None,
        "pareto_front": search.pareto_front or None,
    }
    if search.best is not None:
        best = {"trial": search.best.name, "value": search.best.value, "overrides": search.best.overrides}
        summary["best"] = best | _seeds(search.standings.get(search.best.name))
    return {"search": summary}


def leaderboard_table(search: SearchState) -> WandbTable:
    paths, metrics = parameters(search), _metrics(search)
    columns = [
        "trial",
        "state",
        "rank",
        *metrics,
        "mean",
        "ci_half_width",
        "seeds",
        "feasible",
        "violations",
        "pareto_front",
    ]
    columns += [*paths, "origin", "of", "steps", "tokens", "seconds", "error"]
    has_schedules = any(path.endswith(".schedule_overrides") for trial in search.ranked for path in trial.overrides)
    columns += ["schedule"] if has_schedules else []
    rows, standings = [], search.standings
    for rank, trial in enumerate(search.ranked, start=1):
        seeds = _seeds(standings.get(trial.name))
        constraints = [
            trial.feasible if trial.status == "done" else None,
            ", ".join(violations(search, trial)),
            trial.name in search.pareto_front,
        ]
        details = [trial.origin, trial.of, trial.steps, trial.tokens, trial.seconds, trial.error]
        details += [overrides_text(trial.overrides)] if has_schedules else []
        values = [_metric(search, trial, metric) for metric in metrics]
        means = [seeds.get(key) for key in ("mean", "ci_half_width", "seeds")]
        rows.append(
            [
                trial.name,
                trial.status,
                rank,
                *values,
                *means,
                *constraints,
                *map(trial.final_values.get, paths),
                *details,
            ]
        )
    return table(columns, rows)


def parallel_table(search: SearchState) -> WandbTable:
    paths, metrics = parameters(search), _metrics(search)
    rows = [
        [trial.name, *map(trial.final_values.get, paths), *(_metric(search, trial, metric) for metric in metrics)]
        for trial in search.ranked
        if trial.value is not None
    ]
    return table(["trial", *paths, *metrics], rows)


def importance_table(search: SearchState) -> WandbTable:
    """Parameter importance; without rows if there are too few trials."""
    columns = ["field", "metric", "share", "trials", "significant"]
    metrics = [search.value_name] if search.weighted else [metric for metric, _ in search.objectives]
    rows = [
        [one.path, metric, one.share, one.trials, one.significant]
        for metric in metrics
        for one in importances(search, parameters(search), metric)
    ]
    return table(columns, [] if too_few_trials(search) else rows)


def front_table(search: SearchState) -> WandbTable:
    paths, metrics = parameters(search), [metric for metric, _ in search.objectives]
    rows = [
        [trial.name, *map(trial.values.get, metrics), *map(trial.final_values.get, paths)]
        for trial in search.ranked
        if trial.name in search.pareto_front
    ]
    return table(["trial", *metrics, *paths], rows)


def funnel_table(state: RunState, search: SearchState) -> WandbTable:
    rows: list[list[Any]] = []
    for which, trial in _best_and_worst(search):
        stages = list(_trial_stages(state, trial))
        for dataset in stages:
            if dataset.kind == "dataset" and dataset.facts.get("rows") is not None:
                levels = list(funnel_levels(stages, dataset))
                if len(levels) > 1:  # a single level: the dataset is not filtered
                    rows += [[which, trial.name, dataset.name, one.label, one.rows, one.corrupted] for one in levels]
    return table(["which", "trial", "dataset", "step", "rows", "injected_corruption"], rows)


def samples_table(search: SearchState) -> WandbTable:
    """Sample rows of the filters that the search changes or that differ between the best and the worst trial."""
    trials = _best_and_worst(search)
    rows = []
    for which, trial in trials:
        for stage in trial.stages.values():
            samples = stage.facts.get("samples")
            if stage.kind != "select" or not isinstance(samples, Mapping) or not _is_searched(search, stage, trials):
                continue
            for decile in mappings_in(samples.get("deciles")):
                for key, outcome in (("kept_rows", "kept"), ("dropped_rows", "dropped")):
                    for row in mappings_in(decile.get(key)):
                        cells = [
                            samples.get("score"),
                            row.get("score"),
                            row.get("injected_corruption"),
                            row.get("text"),
                        ]
                        rows.append([which, trial.name, stage.name, outcome, *cells])
    return table(["which", "trial", "filter", "outcome", "score name", "score", "injected_corruption", "text"], rows)


def _metrics(search: SearchState) -> list[str]:
    """The primary value first, then the search's other metrics."""
    return list(dict.fromkeys([search.value_name, *search.metrics]))


def _metric(search: SearchState, trial: TrialState, metric: str) -> float | None:
    return trial.value if metric == search.value_name else trial.values.get(metric)


def _seeds(standing: TrialStanding | None) -> dict[str, Any]:
    return {} if standing is None else dataclasses.asdict(standing)


def _best_and_worst(search: SearchState) -> list[tuple[str, TrialState]]:
    """The best trial and the worst completed one."""
    completed = [trial for trial in search.ranked if trial.status == "done" and trial.value is not None]
    best = search.best
    if best is None:
        return []
    others = [trial for trial in completed if trial is not best]
    return [("best", best), *[("worst", trial) for trial in others[-1:]]]


def _trial_stages(state: RunState, trial: TrialState) -> Iterator[StageState]:
    """The run's stages, replaced by the trial's own where it has them. Only the run's stages have their inputs."""
    for name, stage in state.stages.items():
        own = trial.stages.get(name)
        yield stage if own is None else dataclasses.replace(own, inputs=stage.inputs)


def _is_searched(search: SearchState, stage: StageState, trials: list[tuple[str, TrialState]]) -> bool:
    fingerprints = {trial.stages[stage.name].fingerprint for _, trial in trials if stage.name in trial.stages}
    return len(fingerprints) > 1 or any(path.split(".")[0] == stage.name for path in parameters(search))
