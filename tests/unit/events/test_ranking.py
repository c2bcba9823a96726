"""Ranking of trials and its statistical significance."""

from __future__ import annotations

import json
import math
import random
from typing import Any

import pytest

from tunery.events.ranking import objective_value, pareto_front, seed_stats, statistical_ties, t_quantile
from tunery.search.journal import JournalRecord, TrialStart
from tunery.search.outcome import search_facts
from tunery.spec import Search


def search(**fields: Any) -> Search:
    space = {"sft.epochs": {"choice": [1, 2]}}
    return Search.model_validate_json(json.dumps({"metric": "a", "mode": "min", "trials": 9, "space": space, **fields}))


def record(name: str, state: str = "done", of: str = "", **values: float) -> JournalRecord:
    origin: Any = "replicate" if of else "sampled"
    ended = {"state": state, "values": values, "seconds": 1.0, "error": ""}
    return JournalRecord(TrialStart(name, 0, {"x": name}, origin, of), [], ended)


def test_ranking_is_by_completion_then_feasibility_then_value() -> None:
    result = search(constraints=[{"metric": "b", "max": 0.02}])
    records = [
        record("stopped", "stopped", a=0.1, b=0.0),
        record("infeasible", a=0.2, b=0.03),
        record("unknown", a=0.25),
        record("worse", a=0.5, b=0.02),
        record("better", a=0.4, b=-1.0),
        record("diverged", a=math.nan, b=0.0),
    ]
    facts = search_facts(result, records, "")
    assert [trial["trial"] for trial in facts["trials"][:4]] == ["better", "worse", "infeasible", "unknown"]
    assert facts["best"]["trial"] == "better"
    assert [trial["feasible"] for trial in facts["trials"][:4]] == [True, True, False, False]
    assert search_facts(result, records[:1], "")["best"] is None


def test_weighted_sum_has_the_direction_of_the_first_metric() -> None:
    objectives = [{"metric": "b", "mode": "max", "weight": 2.0}]
    assert objective_value(search(objectives=objectives), {"a": 1.0, "b": 0.25}) == pytest.approx(0.5)
    assert objective_value(search(objectives=objectives, mode="max"), {"a": 1.0, "b": 0.25}) == pytest.approx(1.5)
    assert math.isnan(objective_value(search(objectives=objectives), {"a": 1.0}))


def test_pareto_front_has_every_nondominated_trial() -> None:
    result = search(objectives=[{"metric": "b", "mode": "max"}])
    rng = random.Random(0)
    trials = [
        {"trial": str(i), "state": "done", "values": {"a": rng.randrange(6), "b": rng.randrange(6)}, "value": 1.0}
        for i in range(40)
    ]
    expected = set()
    for trial in trials:
        better = [
            other
            for other in trials
            if other["values"]["a"] <= trial["values"]["a"]  # type: ignore[index]
            and other["values"]["b"] >= trial["values"]["b"]  # type: ignore[index]
            and other["values"] != trial["values"]
        ]
        if not better:
            expected.add(trial["trial"])
    assert pareto_front(result, trials) == expected != set()
    assert pareto_front(search(), trials) == set()


def test_intervals_have_nominal_coverage_and_ties_are_detected() -> None:
    rng = random.Random(1)
    covered = ties = 0
    for _ in range(2000):
        groups = {name: [rng.gauss(0, 1) for _ in range(3)] for name in "abc"}
        actual = seed_stats(groups)
        covered += sum(abs(item.mean) <= item.ci_half_width for item in actual)  # type: ignore[operator]
        ties += len(statistical_ties(actual[0], actual[1:2], {name: groups[name] for name in "abc"}))
    assert 0.93 < covered / 6000 < 0.97
    assert 0.93 < ties / 2000 < 0.97
    distant = {"a": [0.0, 0.1, 0.2], "b": [5.0, 5.1, 5.2]}
    assert statistical_ties(seed_stats(distant)[0], seed_stats(distant), distant) == []
    assert seed_stats({"a": [1.0]})[0].ci_half_width is None


def test_student_t_converges_to_the_normal_distribution() -> None:
    values = [t_quantile(freedom) for freedom in range(1, 200)]
    assert values == sorted(values, reverse=True)
    assert t_quantile(20) == pytest.approx(2.086, abs=2e-3)
    assert t_quantile(60) == pytest.approx(2.000, abs=2e-3)


def test_winner_has_the_best_mean_over_seeds() -> None:
    records = [
        record("single", a=1.0),
        record("good", a=1.1),
        record("third", a=3.0),
        record("single-1", of="single", a=2.0),
        record("single-2", of="single", a=2.0),
        record("good-1", of="good", a=1.1),
        record("good-2", of="good", a=1.2),
    ]
    facts = search_facts(search(num_seeds=3, replicate_top_k=2), records, "")
    assert facts["best"]["trial"] == "good"
    assert {item["trial"]: item["mean"] for item in facts["standings"]} == pytest.approx(
        {"single": 5 / 3, "good": 3.4 / 3}
    )
    assert facts["ties"] == ["single"]
    assert [trial["origin"] for trial in facts["trials"]] == ["sampled"] * 3 + ["replicate"] * 4


def test_diverged_seed_counts_against_its_trial() -> None:
    records = [
        record("one", a=1.0),
        record("two", a=1.1),
        record("one-1", of="one", a=1.0),
        record("one-2", of="one", a=math.nan),
        record("two-1", of="two", a=1.1),
        record("two-2", of="two", a=1.2),
    ]
    facts = search_facts(search(num_seeds=3, replicate_top_k=2), records, "")
    assert facts["best"]["trial"] == "two"
    assert {item["trial"]: item["values"] for item in facts["standings"]} == {"one": [1.0, 1.0], "two": [1.1, 1.1, 1.2]}


def test_trial_does_not_win_because_only_it_was_replicated() -> None:
    """Replicates are missing if the budget was spent, or if those of the best trial failed."""
    records = [record("one", a=1.0), record("two", a=2.0), record("two-1", of="two", a=2.1)]
    assert search_facts(search(num_seeds=2, replicate_top_k=2), records, "")["best"]["trial"] == "one"
    records.append(record("one-1", "failed", of="one"))
    assert search_facts(search(num_seeds=2, replicate_top_k=2), records, "")["best"]["trial"] == "one"
