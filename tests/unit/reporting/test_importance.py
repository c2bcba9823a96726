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
    trials_by_name = {
        f"t{index}": TrialState(f"t{index}", overrides, status="done", value=value)
        for index, (overrides, value) in enumerate(trials)
    }
    return SearchState(metric="m", trials=trials_by_name, **more)


def by_path(search: SearchState, *paths: str, metric: str = "") -> dict[str, Importance]:
    return {item.path: item for item in importances(search, paths, metric)}


def test_importance_is_high_for_a_field_that_determines_the_metric_and_low_for_others() -> None:
    rng = random.Random(1)
    points = [{"a": rng.random(), "b": rng.random()} for _ in range(60)]
    actual = by_path(search_of([(point, (point["a"] - 0.5) ** 2) for point in points]), "b", "a")
    assert next(iter(actual)) == "a", "the largest share first"
    assert actual["a"].share is not None
    assert actual["a"].share > 0.6, "also if the best values are in the middle"
    assert actual["a"].significant
    assert not actual["b"].significant


def test_noise_has_importance_near_zero_and_nominal_false_positives() -> None:
    rng = random.Random(2)
    shares, false_positives = [], 0
    for _ in range(400):
        actual = by_path(search_of([({"a": rng.random()}, rng.random()) for _ in range(20)]), "a")["a"]
        shares.append(actual.share or 0.0)
        false_positives += actual.significant
    assert fmean(shares) < 0.08
    assert 5 <= false_positives <= 32


def test_one_diverged_trial_does_not_hide_the_others() -> None:
    points = [({"a": index / 20}, 3 + index / 20) for index in range(20)]
    points[7] = (points[7][0], 1e6)
    share = by_path(search_of(points), "a")["a"].share
    assert share is not None
    assert share > 0.5


def test_conditional_field_is_evaluated_on_trials_that_have_it() -> None:
    points = [({"a": "x", "b": index / 10}, 5.0 - index / 10) for index in range(10)]
    points += [({"a": "y"}, float(index)) for index in range(10)]
    actual = by_path(search_of(points), "a", "b")
    assert (actual["a"].trials, actual["b"].trials) == (20, 10)
    assert actual["b"].share is not None
    assert actual["b"].share > 0.5


def test_too_few_trials_give_a_message() -> None:
    few = search_of([({"a": index / 9}, float(index)) for index in range(MIN_TRIALS - 1)])
    assert by_path(few, "a")["a"].share is None
    assert too_few_trials(few) == "7 completed trials; parameter importance needs at least 8"
    assert too_few_trials(search_of([({"a": index / 9}, float(index)) for index in range(MIN_TRIALS)])) == ""


def test_stopped_failed_and_replicate_trials_are_excluded() -> None:
    search = search_of([({"a": index / 12}, float(index)) for index in range(12)])
    search.trials["t0"].status, search.trials["t1"].value = "stopped", None
    search.trials["t2"].origin = "replicate"
    assert by_path(search, "a")["a"].trials == 9


def test_constant_fields_and_constant_metrics_have_no_importance() -> None:
    constant = search_of([({"a": 1, "b": index}, 2.0) for index in range(12)])
    actual = by_path(constant, "a", "b")
    assert (actual["a"].share, actual["b"].share) == (None, 0.0)


def test_importance_is_computed_per_metric() -> None:
    search = replay(searched_events()).search
    assert search is not None
    for metric in (LOSS, FORGETTING):
        actual = by_path(search, RATE, SCHEDULE, WARMUP, SHARE, metric=metric)
        assert next(iter(actual)) == RATE
        assert actual[WARMUP].trials == 8


def test_pbt_child_counts_with_its_final_values() -> None:
    """All children started with the same rate."""
    points = [
        ({"sft.learning_rate": 1.0, "sft.schedule_overrides": [{"after": 0.2, "learning_rate": rate}]}, rate)
        for rate in (float(index) for index in range(2, 26))
    ]
    actual = by_path(search_of(points), "sft.learning_rate")["sft.learning_rate"]
    assert actual.share is not None
    assert actual.share > 0.6
