"""Summary tables printed at the end of a run, built from the facts of its artifacts, and the same numbers as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tunery.events.event_reducer import replay
from tunery.events.leaderboard import leaderboard, winner_summary
from tunery.events.run_state import SearchState
from tunery.reporting.evaluation_tables import loss_table, win_table
from tunery.reporting.filter_tables import diversity_table, filter_table, review_table
from tunery.reporting.tables import SummaryTable
from tunery.reporting.training_tables import training_tables
from tunery.spec import TRAINERS, Experiment, Training
from tunery.store import Artifact


def summary_tables(
    experiment: Experiment,
    artifacts: Mapping[str, Artifact],
    best: Mapping[str, Artifact],
    search: Artifact | None,
) -> list[SummaryTable]:
    """Return the tables of a run, in the order of its stages. `best`: evaluations of the best trial, by stage;
    `search`: the artifact of the search, if there is one."""
    tables = [
        filter_table(experiment, artifacts),
        diversity_table(experiment, artifacts),
        review_table(experiment, artifacts),
        *training_tables(experiment, artifacts),
        loss_table(experiment, artifacts, best),
        win_table(experiment, artifacts, best),
        search_table(experiment, search),
    ]
    return [table for table in tables if table is not None]


def results(experiment: Experiment, artifacts: Mapping[str, Artifact]) -> dict[str, Any]:
    """Return metrics by stage, for JSON output: the result rows of an evaluation; for a training its first metric on
    `eval_data` (a loss or a reward), None without `eval_data`."""
    values = {}
    for name, artifact in artifacts.items():
        stage = experiment.stages[name]
        if isinstance(stage, Training):
            values[name] = artifact.facts.get(next(iter(TRAINERS[stage.kind].metrics), ""))
        elif stage.output_type == "metrics":
            values[name] = artifact.facts.get("results")
    return values


MAX_TRIALS = 20
"""Rows of the search table; the report and W&B have all trials."""


def search_table(experiment: Experiment, artifact: Artifact | None) -> SummaryTable | None:
    """The trials, best first, with notes on the winner and its statistical ties."""
    if artifact is None or experiment.search is None:
        return None
    facts = artifact.facts
    result = {key: facts.get(key) for key in ("standings", "ties", "pareto_front", "ended_by")}
    # The events that a reused search logs.
    events: list[dict[str, Any]] = [
        {"event": "search_started", **experiment.search.describe()},
        *({"event": "trial_finished", **trial} for trial in facts["trials"]),
        {"event": "search_finished", "best": (facts.get("best") or {}).get("trial"), **result},
    ]
    search = replay(events).search
    assert search is not None, "search_started was replayed"
    board = leaderboard(search, words=True)
    hidden = len(board.rows) - MAX_TRIALS
    notes = [
        *winner_summary(search),
        _trial_counts(search) + (f"; the report has the other {hidden}" if hidden > 0 else ""),
    ]
    return {
        "title": "Search, best first",
        "columns": board.columns,
        "rows": board.rows[:MAX_TRIALS],
        "notes": notes,
        "optional": board.optional,
    }


def _trial_counts(search: SearchState) -> str:
    states = [trial.status for trial in search.originals]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("done", "stopped", "failed") if state in states)
    replicates = len(search.trials) - len(states)
    return f"{len(states)} trials: {counts}" + (f"; {replicates} replicates with other seeds" if replicates else "")
