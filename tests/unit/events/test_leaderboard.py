"""The best trial of a search, its uncertainty, and the table of trials."""

from __future__ import annotations

from typing import Any

from sample_run import sample_events
from sample_search import FORGETTING, LOSS, RATE, WARMUP, event, searched_events

from tunery.events.event_reducer import replay
from tunery.events.leaderboard import column_names, leaderboard, winner_summary
from tunery.events.run_state import SearchState


def search_of(events: list[dict[str, Any]]) -> SearchState:
    search = replay(events).search
    assert search is not None
    return search


def column(search: SearchState, name: str) -> dict[str, object]:
    board = leaderboard(search, times=True)
    index = board.columns.index(name)
    return {str(row[0]): row[index] for row in board.rows}


def test_replicates_have_no_row_and_contribute_mean_and_interval() -> None:
    search = search_of(searched_events())
    means, seeds = column(search, "mean of seeds"), column(search, "seeds")
    assert not {"r00", "r01"} & means.keys()
    assert len(means) == 16
    assert means["t00"] == "3.105 ± 0.012"
    assert (seeds["t00"], seeds["t02"]) == (2, None)


def test_ranking_is_replicated_then_single_then_infeasible_trials() -> None:
    search = search_of(searched_events())
    ranked = search.ranked
    assert [trial.name for trial in ranked[:2]] == ["t00", "t01"]
    feasible = [trial.feasible for trial in ranked]
    assert feasible == sorted(feasible, reverse=True)
    single = [trial.value or 0.0 for trial in ranked[2:] if trial.feasible]
    assert single == sorted(single)
    assert leaderboard(search).best_row == 0


def test_table_has_violated_constraints_and_origins() -> None:
    search = search_of(searched_events())
    violations, origins = column(search, "violations"), column(search, "origin")
    for trial in search.originals:
        assert violations[trial.name] == (None if trial.feasible else "forgetting > 0.1")
    assert (origins["t00"], origins["t02"], origins["t03"]) == (None, "initial", "cloned from t00")


def test_metrics_and_fields_have_columns_and_missing_fields_are_empty() -> None:
    search = search_of(searched_events())
    board = leaderboard(search)
    assert {"eval_loss", "forgetting", "learning_rate", "warmup", "tokens"} <= set(board.columns)
    warmup = column(search, "warmup")
    assert (warmup["t01"], warmup["t02"]) == (None, search.trials["t02"].overrides[WARMUP])
    assert column_names(search)[RATE] == "learning_rate"


def test_tie_is_described_in_the_summary() -> None:
    lines = winner_summary(search_of(searched_events()))
    assert lines[0].startswith("best: t00, eval loss 3.105 ± 0.012 over 2 seeds, with learning_rate=")
    assert lines[1] == "tied with t01: not significantly different over 2 seeds"
    assert lines[2].startswith("Pareto front of eval_loss and forgetting: t00 and t03; ")
    assert len(lines) == 3


def test_winner_without_replicates_is_by_one_seed() -> None:
    events = [
        item for item in searched_events(standings=[], ties=[], pareto_front=[]) if item.get("origin") != "replicate"
    ]
    events = [item for item in events if not str(item.get("trial", "")).startswith("r")]
    (line,) = winner_summary(search_of(events))
    assert "by one seed" in line


def test_reason_for_an_early_end_is_reported() -> None:
    search = search_of(searched_events(ended_by="the budget of 2 hours is spent"))
    assert winner_summary(search)[-1] == "the search ended early: the budget of 2 hours is spent"


def test_infeasible_winner_is_reported() -> None:
    end = {"state": "done", "value": 2.0, "values": {LOSS: 2.0, FORGETTING: 0.5}, "feasible": False}
    start = next(item for item in searched_events() if item["event"] == "search_started")
    lines = winner_summary(search_of([start, event("trial_finished", 9, trial="t", overrides={}, **end)]))
    assert lines[1] == "no trial satisfies the constraints: t has forgetting > 0.1"


def test_running_search_reports_the_best_so_far_with_its_replicates() -> None:
    events = [item for item in searched_events() if item["event"] not in ("search_finished", "run_finished")]
    search = search_of(events)
    assert winner_summary(search)[0].startswith("best so far: t00, eval loss 3.105 over 2 seeds")


def test_log_without_origins_and_values_still_gives_a_table() -> None:
    search = search_of(sample_events())
    board = leaderboard(search)
    assert board.columns[:3] == ["trial", "state", "loss"]
    assert "origin" not in board.columns
    assert len(board.rows) == 12


def test_weighted_sum_has_a_column_next_to_its_metrics() -> None:
    events = searched_events()
    start = next(item for item in events if item["event"] == "search_started")
    start["objectives"] = [{"metric": FORGETTING, "mode": "min", "weight": 2.0}]
    search = search_of(events)
    assert {"weighted sum", "eval_loss", "forgetting"} <= set(leaderboard(search).columns)
    assert search.objectives == [(LOSS, "min")]
