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
    place = board.columns.index(name)
    return {str(row[0]): row[place] for row in board.rows}


def test_replicates_have_no_row_and_give_their_trial_a_mean_with_its_interval() -> None:
    search = search_of(searched_events())
    means, seeds = column(search, "mean of seeds"), column(search, "seeds")
    assert not {"r00", "r01"} & means.keys()
    assert len(means) == 16
    assert means["t00"] == "3.105 ± 0.012"
    assert (seeds["t00"], seeds["t02"]) == (2, None)


def test_repeated_trials_lead_by_their_mean_then_single_values_then_those_that_break_a_constraint() -> None:
    search = search_of(searched_events())
    ranked = search.ranked
    assert [trial.name for trial in ranked[:2]] == ["t00", "t01"]
    feasible = [trial.feasible for trial in ranked]
    assert feasible == sorted(feasible, reverse=True)
    single = [trial.value or 0.0 for trial in ranked[2:] if trial.feasible]
    assert single == sorted(single)
    assert leaderboard(search).chosen == 0


def test_table_says_which_constraint_is_broken_and_where_a_trial_comes_from() -> None:
    search = search_of(searched_events())
    breaks, came = column(search, "breaks"), column(search, "origin")
    for trial in search.own:
        assert breaks[trial.name] == (None if trial.feasible else "forgetting > 0.1")
    assert (came["t00"], came["t02"], came["t03"]) == (None, "first", "cloned from t00")


def test_all_metrics_and_fields_have_a_column_and_a_missing_field_a_gap() -> None:
    search = search_of(searched_events())
    board = leaderboard(search)
    assert {"eval_loss", "forgetting", "learning_rate", "warmup", "tokens"} <= set(board.columns)
    warmup = column(search, "warmup")
    assert (warmup["t01"], warmup["t02"]) == (None, search.trials["t02"].overrides[WARMUP])
    assert column_names(search)[RATE] == "learning_rate"


def test_a_tie_is_told_in_words() -> None:
    lines = winner_summary(search_of(searched_events()))
    assert lines[0].startswith("best: t00, eval loss 3.105 ± 0.012 over 2 seeds, with learning_rate=")
    assert lines[1] == "a tie with t01: 2 seeds can't tell them apart"
    assert lines[2].startswith("Pareto front of eval_loss and forgetting: t00 and t03; ")
    assert len(lines) == 3


def test_a_winner_that_was_not_repeated_is_said_to_be_by_one_seed() -> None:
    events = [one for one in searched_events(standings=[], ties=[], front=[]) if one.get("origin") != "replicate"]
    events = [one for one in events if not str(one.get("trial", "")).startswith("r")]
    (line,) = winner_summary(search_of(events))
    assert "by one seed" in line


def test_what_ended_a_search_early_is_told() -> None:
    search = search_of(searched_events(ended_by="the budget of 2 hours is spent"))
    assert winner_summary(search)[-1] == "the search ended early: the budget of 2 hours is spent"


def test_winner_that_breaks_a_constraint_says_so() -> None:
    end = {"state": "done", "value": 2.0, "values": {LOSS: 2.0, FORGETTING: 0.5}, "feasible": False}
    opening = next(one for one in searched_events() if one["event"] == "search_started")
    lines = winner_summary(search_of([opening, event("trial_finished", 9, trial="t", overrides={}, **end)]))
    assert lines[1] == "no trial keeps to the constraints: t has forgetting > 0.1"


def test_search_under_way_names_the_best_so_far_and_is_by_its_replicates_as_they_come() -> None:
    events = [one for one in searched_events() if one["event"] not in ("search_finished", "run_finished")]
    search = search_of(events)
    assert winner_summary(search)[0].startswith("best so far: t00, eval loss 3.105 over 2 seeds")


def test_log_from_before_origins_and_values_were_told_gives_a_table_all_the_same() -> None:
    search = search_of(sample_events())
    board = leaderboard(search)
    assert board.columns[:3] == ["trial", "state", "loss"]
    assert "origin" not in board.columns
    assert len(board.rows) == 12


def test_weighted_sum_has_a_column_beside_its_metrics() -> None:
    events = searched_events()
    opening = next(one for one in events if one["event"] == "search_started")
    opening["also"] = [{"metric": FORGETTING, "mode": "min", "weight": 2.0}]
    search = search_of(events)
    assert {"weighted sum", "eval_loss", "forgetting"} <= set(leaderboard(search).columns)
    assert search.objectives == [(LOSS, "min")]
