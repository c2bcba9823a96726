"""Share of a metric's variance that each searched field explains."""

from __future__ import annotations

import random
from statistics import fmean
from typing import Any

from sample_search import FORGETTING, LOSS, RATE, SCHEDULE, SHARE, WARMUP, searched_events

from tunery.events.event_reducer import replay
from tunery.events.run_state import SearchState, TrialState
from tunery.reporting.importance import MIN_TRIALS, Importance, importances, too_few_trials


def search_of(trials: list[tuple[dict[str, Any], float]], **more: Any) -> SearchState:
    made = {
        f"t{index}": TrialState(f"t{index}", overrides, status="done", value=value)
        for index, (overrides, value) in enumerate(trials)
    }
    return SearchState(metric="m", trials=made, **more)


def by_path(search: SearchState, *paths: str, metric: str = "") -> dict[str, Importance]:
    return {one.path: one for one in importances(search, paths, metric)}


def test_field_that_decides_the_metric_explains_nearly_all_and_another_nearly_nothing() -> None:
    chance = random.Random(1)
    points = [{"a": chance.random(), "b": chance.random()} for _ in range(60)]
    found = by_path(search_of([(point, (point["a"] - 0.5) ** 2) for point in points]), "b", "a")
    assert next(iter(found)) == "a", "the largest share first"
    assert found["a"].share is not None
    assert found["a"].share > 0.6, "also where the best values lie in the middle"
    assert found["a"].significant
    assert not found["b"].significant


def test_noise_has_a_share_near_zero_and_passes_for_more_than_chance_in_one_case_of_twenty() -> None:
    chance = random.Random(2)
    shares, beyond = [], 0
    for _ in range(400):
        found = by_path(search_of([({"a": chance.random()}, chance.random()) for _ in range(20)]), "a")["a"]
        shares.append(found.share or 0.0)
        beyond += found.significant
    assert fmean(shares) < 0.08
    assert 5 <= beyond <= 32


def test_one_diverged_trial_does_not_hide_the_others() -> None:
    points = [({"a": index / 20}, 3 + index / 20) for index in range(20)]
    points[7] = (points[7][0], 1e6)
    share = by_path(search_of(points), "a")["a"].share
    assert share is not None
    assert share > 0.5


def test_conditional_field_is_judged_among_the_trials_that_have_it() -> None:
    points = [({"a": "x", "b": index / 10}, 5.0 - index / 10) for index in range(10)]
    points += [({"a": "y"}, float(index)) for index in range(10)]
    found = by_path(search_of(points), "a", "b")
    assert (found["a"].trials, found["b"].trials) == (20, 10)
    assert found["b"].share is not None
    assert found["b"].share > 0.5


def test_too_few_trials_give_a_message() -> None:
    few = search_of([({"a": index / 9}, float(index)) for index in range(MIN_TRIALS - 1)])
    assert by_path(few, "a")["a"].share is None
    assert too_few_trials(few) == "7 completed trials; parameter importance needs at least 8"
    assert too_few_trials(search_of([({"a": index / 9}, float(index)) for index in range(MIN_TRIALS)])) == ""


def test_trials_that_were_stopped_or_failed_and_replicates_are_no_points() -> None:
    search = search_of([({"a": index / 12}, float(index)) for index in range(12)])
    search.trials["t0"].status, search.trials["t1"].value = "stopped", None
    search.trials["t2"].origin = "replicate"
    assert by_path(search, "a")["a"].trials == 9


def test_field_with_one_value_has_no_share_and_equal_metrics_give_none_of_them_any() -> None:
    same = search_of([({"a": 1, "b": index}, 2.0) for index in range(12)])
    found = by_path(same, "a", "b")
    assert (found["a"].share, found["b"].share) == (None, 0.0)


def test_each_metric_has_shares_of_its_own() -> None:
    search = replay(searched_events()).search
    assert search is not None
    for metric in (LOSS, FORGETTING):
        found = by_path(search, RATE, SCHEDULE, WARMUP, SHARE, metric=metric)
        assert next(iter(found)) == RATE
        assert found[WARMUP].trials == 8


def test_a_copy_of_a_population_counts_with_the_values_that_it_ended_with() -> None:
    """All began with the same rate."""
    points = [
        ({"sft.learning_rate": 1.0, "sft.schedule_overrides": [{"after": 0.2, "learning_rate": rate}]}, rate)
        for rate in (float(index) for index in range(2, 26))
    ]
    found = by_path(search_of(points), "sft.learning_rate")["sft.learning_rate"]
    assert found.share is not None
    assert found.share > 0.6
