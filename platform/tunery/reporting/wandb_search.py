"""What W&B is told of a search as a whole: tables of its run `comparison`. Pure.

leaderboard            a row a trial, best first: metrics, mean and half of the 95% interval over seeds, values
parallel_coordinates   a row a trial: values and metrics only, what W&B's chart of that name draws
importance             a row a searched field and metric (reporting/importance.py)
pareto_front           a row a trial of the front
funnel                 rows of each dataset, and how many each filter kept, in the best and in the worst trial
filter_samples         some rows that the searched filters of these two kept, and some that they dropped
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tunery.events.formatting import overrides_text
from tunery.events.leaderboard import broken, parameters
from tunery.events.run_state import RunState, SearchState, StageState, TrialStanding, TrialState
from tunery.events.stage_summary import listed
from tunery.reporting.importance import importances, too_few
from tunery.reporting.report_sections import funnel_levels
from tunery.reporting.wandb_values import Drawn, Table, table


def search_tables(state: RunState) -> dict[str, Drawn]:
    """Those that have a row."""
    search = state.search
    if search is None or not search.trials:
        return {}
    tables = {
        "leaderboard": leaderboard_table(search),
        "parallel_coordinates": parallel_table(search),
        "importance": importance_table(search),
        "pareto_front": front_table(search),
        "funnel": funnel_table(state, search),
        "filter_samples": samples_table(search),
    }
    return {name: told for name, told in tables.items() if told.rows}


def search_summary(search: SearchState) -> dict[str, Any]:
    """Numbers and words of the summary, under `search.`."""
    told: dict[str, Any] = {"trials": {state: search.count(state) for state in ("done", "stopped", "failed")}}
    told |= {"ended_by": search.ended_by or None, "ties": search.ties or None, "front": search.front or None}
    if search.best is not None:
        best = {"trial": search.best.name, "value": search.best.value, "overrides": search.best.overrides}
        told["best"] = best | _seeds(search.standings.get(search.best.name))
    return {"search": told}


def leaderboard_table(search: SearchState) -> Table:
    paths, metrics = parameters(search), _metrics(search)
    columns = ["trial", "state", "place", *metrics, "mean", "half", "seeds", "feasible", "breaks", "front"]
    columns += [*paths, "origin", "of", "steps", "tokens", "seconds", "error"]
    changes = any(path.endswith(".schedule_overrides") for trial in search.ranked for path in trial.overrides)
    columns += ["with its changes"] if changes else []
    rows, standings = [], search.standings
    for place, trial in enumerate(search.ranked, start=1):
        seeds = _seeds(standings.get(trial.name))
        judged = [
            trial.feasible if trial.status == "done" else None,
            ", ".join(broken(search, trial)),
            trial.name in search.front,
        ]
        told = [trial.origin, trial.of, trial.steps, trial.tokens, trial.seconds, trial.error]
        told += [overrides_text(trial.overrides)] if changes else []
        measured = [_metric(search, trial, metric) for metric in metrics]
        means = [seeds.get(key) for key in ("mean", "half", "seeds")]
        rows.append(
            [trial.name, trial.status, place, *measured, *means, *judged, *map(trial.present.get, paths), *told]
        )
    return table(columns, rows)


def parallel_table(search: SearchState) -> Table:
    paths, metrics = parameters(search), _metrics(search)
    rows = [
        [trial.name, *map(trial.present.get, paths), *(_metric(search, trial, metric) for metric in metrics)]
        for trial in search.ranked
        if trial.value is not None
    ]
    return table(["trial", *paths, *metrics], rows)


def importance_table(search: SearchState) -> Table:
    """Empty where there are too few trials."""
    columns = ["field", "metric", "share", "trials", "beyond_chance"]
    metrics = [search.value_name] if search.weighted else [metric for metric, _ in search.objectives]
    rows = [
        [one.path, metric, one.share, one.trials, one.beyond_chance]
        for metric in metrics
        for one in importances(search, parameters(search), metric)
    ]
    return table(columns, [] if too_few(search) else rows)


def front_table(search: SearchState) -> Table:
    paths, metrics = parameters(search), [metric for metric, _ in search.objectives]
    rows = [
        [trial.name, *map(trial.values.get, metrics), *map(trial.present.get, paths)]
        for trial in search.ranked
        if trial.name in search.front
    ]
    return table(["trial", *metrics, *paths], rows)


def funnel_table(state: RunState, search: SearchState) -> Table:
    rows: list[list[Any]] = []
    for which, trial in _ends(search):
        stages = list(_stages_of(state, trial))
        for dataset in stages:
            if dataset.kind == "dataset" and dataset.facts.get("rows") is not None:
                levels = list(funnel_levels(stages, dataset))
                if len(levels) > 1:  # without a filter there is nothing to see
                    rows += [[which, trial.name, dataset.name, one.label, one.rows, one.planted] for one in levels]
    return table(["which", "trial", "dataset", "step", "rows", "planted"], rows)


def samples_table(search: SearchState) -> Table:
    """Of the filters that the search changes: those whose results differ between the best and the worst trial."""
    ends = _ends(search)
    rows = []
    for which, trial in ends:
        for stage in trial.stages.values():
            samples = stage.facts.get("samples")
            if stage.kind != "select" or not isinstance(samples, Mapping) or not _searched(search, stage, ends):
                continue
            for decile in listed(samples.get("deciles")):
                for key, verdict in (("kept_rows", "kept"), ("dropped_rows", "dropped")):
                    for row in listed(decile.get(key)):
                        about = [samples.get("score"), row.get("score"), row.get("planted"), row.get("text")]
                        rows.append([which, trial.name, stage.name, verdict, *about])
    return table(["which", "trial", "filter", "verdict", "measure", "score", "planted", "text"], rows)


def _metrics(search: SearchState) -> list[str]:
    """What the search goes by first, then the metrics that it knows."""
    return list(dict.fromkeys([search.value_name, *search.metrics]))


def _metric(search: SearchState, trial: TrialState, metric: str) -> float | None:
    return trial.value if metric == search.value_name else trial.values.get(metric)


def _seeds(standing: TrialStanding | None) -> dict[str, Any]:
    return {} if standing is None else dataclasses.asdict(standing)


def _ends(search: SearchState) -> list[tuple[str, TrialState]]:
    """The best trial and the worst one that ran to its end."""
    ended = [trial for trial in search.ranked if trial.status == "done" and trial.value is not None]
    best = search.best
    if best is None:
        return []
    others = [trial for trial in ended if trial is not best]
    return [("best", best), *[("worst", trial) for trial in others[-1:]]]


def _stages_of(state: RunState, trial: TrialState) -> Iterator[StageState]:
    """The run's stages as the trial has them. What they read is known of the run's alone."""
    for name, stage in state.stages.items():
        own = trial.stages.get(name)
        yield stage if own is None else dataclasses.replace(own, inputs=stage.inputs)


def _searched(search: SearchState, stage: StageState, ends: list[tuple[str, TrialState]]) -> bool:
    twins = [trial.stages[stage.name].fingerprint for _, trial in ends if stage.name in trial.stages]
    return len(set(twins)) > 1 or any(path.split(".")[0] == stage.name for path in parameters(search))
