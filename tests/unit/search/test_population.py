"""Population based training: replaced members and their sources, in any order of reports."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunery.search.journal import Journal, TrialStart
from tunery.search.population import Exploit, Population, overridable_paths
from tunery.search.space import Point, random_point, trial_id
from tunery.spec import Search, Sft
from tunery.spec.overrides import final_values
from tunery.training.batches import evenly_spaced_steps
from tunery.training.schedule import build_schedule, override_step

SPACE: dict[str, Any] = {
    "sft.learning_rate": {"loguniform": [1e-5, 1e-2]},
    "sft.weight_decay": {"choice": [0.0, 0.01, 0.1]},
    "sft.tuner.lora.rank": {"choice": [4, 8]},
}
NUM_EVALS, STEPS, SIZE = 5, 50, 8


def search(**fields: Any) -> Search:
    fields = {"metric": "sft.eval_loss", "mode": "min", "trials": SIZE, "scheduler": "pbt", "space": SPACE, **fields}
    return Search.model_validate_json(json.dumps(fields))


def population(**fields: Any) -> Population:
    return Population(search(**fields), "sft", NUM_EVALS, seed=7)


def report(point: Point, generation: int) -> dict[str, float]:
    """Return the metrics of a trial, whose loss is lower the closer its learning rates are to 1e-3."""
    rates = [point["sft.learning_rate"]]
    for change in point.get("sft.schedule_overrides", ()):
        rates += [change["learning_rate"]] * (change["after"] < generation / NUM_EVALS)
    loss = sum(abs(math.log10(rate) + 3) for rate in rates) / len(rates)
    step = evenly_spaced_steps(STEPS, NUM_EVALS)[generation - 1]
    return {"sft.eval_loss": loss, "steps": float(step), "share": step / STEPS}


def train_all(pbt: Population, order: Callable[[list[str]], list[str]]) -> list[Exploit]:
    """Train all members to the end. In each iteration one active member, the first in `order`, reports."""
    points = {trial_id(point): point for point in initial_points()}
    for name, point in points.items():
        pbt.add_member(name, point)
    next_generation = dict.fromkeys(points, 1)
    results: list[Exploit] = []
    while active := order(
        [name for name in next_generation if name not in pbt.replaced and next_generation[name] < NUM_EVALS]
    ):
        name = active[0]
        pbt.record(name, report(points[name], next_generation[name]))
        next_generation[name] += 1
        for exploit in decide(pbt):
            results.append(exploit)
            child = trial_id(exploit.overrides)
            points[child] = exploit.overrides
            next_generation[child] = round(exploit.overrides["sft.schedule_overrides"][-1]["after"] * NUM_EVALS) + 1
    return results


def decide(pbt: Population) -> list[Exploit]:
    """Let the population decide; return its exploits and clear them."""
    pbt.decide()
    actual, pbt.pending_children = pbt.pending_children, []
    assert [exploit.member for exploit in actual] == pbt.to_stop
    pbt.to_stop.clear()
    return actual


def initial_points() -> list[Point]:
    return [random_point(search().space, 7, number, {}) for number in range(SIZE)]


def in_random_order(seed: int) -> Callable[[list[str]], list[str]]:
    rng = random.Random(seed)
    return lambda names: rng.sample(names, len(names))


@pytest.mark.parametrize("seed", range(5))
def test_replacements_do_not_depend_on_trial_speed(seed: int) -> None:
    expected = train_all(population(), lambda names: names)
    assert len(expected) == (NUM_EVALS - 1) * SIZE // 4
    assert train_all(population(), in_random_order(seed)) == expected


def test_worst_quarter_is_replaced_by_perturbed_copies_of_the_best() -> None:
    pbt = population()
    first = {trial_id(point): point for point in initial_points()}
    actual = [
        exploit
        for exploit in train_all(pbt, lambda names: names)
        if len(exploit.overrides["sft.schedule_overrides"]) == 1
    ]
    actual = [exploit for exploit in actual if exploit.overrides["sft.schedule_overrides"][0]["after"] == 0.2]
    losses = {name: report(point, 1)["sft.eval_loss"] for name, point in first.items()}
    ranked = sorted(losses, key=lambda name: losses[name])
    assert {exploit.member for exploit in actual} == set(ranked[-2:])
    assert {exploit.source for exploit in actual} <= set(ranked[:2])
    for exploit in actual:
        assert exploit.source_step == 10
        assert {
            **first[exploit.source],
            "sft.schedule_overrides": exploit.overrides["sft.schedule_overrides"],
        } == exploit.overrides
        (change,) = exploit.overrides["sft.schedule_overrides"]
        assert search().space["sft.learning_rate"].contains(change["learning_rate"])
        assert change["weight_decay"] in (0.0, 0.01, 0.1)
        assert final_values(exploit.overrides)["sft.learning_rate"] == change["learning_rate"]
    assert overridable_paths(search(), "sft") == ["sft.learning_rate", "sft.weight_decay"]


def test_child_is_a_training_whose_override_starts_after_the_evaluation() -> None:
    (change,) = train_all(population(), lambda names: names)[0].overrides["sft.schedule_overrides"]
    assert change["after"] == 1 / NUM_EVALS
    for evaluations in range(2, 13):
        for steps in (12, 50, 51, 99, 300):
            evaluation_steps = evenly_spaced_steps(steps, evaluations)[:-1]
            assert [override_step(g / evaluations, steps) for g in range(1, evaluations)] == evaluation_steps
    fields = {"kind": "sft", "data": "a", "model": "b", "epochs": 1, "learning_rate": 1e-3, "schedule": "constant"}
    spec = Sft.model_validate_json(json.dumps({**fields, "warmup": 0, "schedule_overrides": [change]}))
    rates = build_schedule(spec, STEPS).learning_rates
    assert rates == (1e-3,) * 10 + (change["learning_rate"],) * 40


def test_journal_restores_the_population(tmp_path: Path) -> None:
    journal, pbt = Journal(tmp_path / "journal.jsonl"), population()
    points = {trial_id(point): point for point in initial_points()}
    for number, (name, point) in enumerate(points.items()):
        journal.begin(TrialStart(name, number, point, "sampled"))
        pbt.add_member(name, point)
    for name, point in points.items():
        for generation in (1, 2):  # members do not wait for the decision
            journal.report(name, report(point, generation))
            pbt.record(name, report(point, generation))
    actual = decide(pbt)
    for exploit in actual[:1]:  # the search was killed before the other one started
        journal.begin(
            TrialStart(
                trial_id(exploit.overrides), 9, exploit.overrides, "pbt_child", exploit.source, exploit.source_step
            )
        )
        journal.end(exploit.member, state="stopped", values={}, seconds=1.0, error="")
    restored = population()
    restored.replay(Journal(tmp_path / "journal.jsonl").records.values())
    assert restored.pending_children == actual
    assert restored.to_stop == [exploit.member for exploit in actual]
    assert restored.replaced == pbt.replaced


def test_failed_members_are_skipped_and_members_without_a_value_are_replaced() -> None:
    pbt = population()
    points = {trial_id(point): point for point in initial_points()}
    for name, point in points.items():
        pbt.add_member(name, point)
    failed, diverged, *others = points
    pbt.record(diverged, {**report(points[diverged], 1), "sft.eval_loss": math.nan})
    for name in others:
        pbt.record(name, report(points[name], 1))
    assert decide(pbt) == [], "one member has neither reported nor ended"
    assert pbt.awaits_decision(diverged)
    pbt.mark_ended(failed)
    replaced = {exploit.member for exploit in decide(pbt)}
    assert diverged in replaced
    assert failed not in replaced
    assert not pbt.awaits_decision(others[0])
    assert pbt.stale_checkpoints() == [], "the children have not started yet"


def test_decision_waits_for_a_retried_member() -> None:
    pbt = population()
    points = {trial_id(point): point for point in initial_points()}
    for name, point in points.items():
        pbt.add_member(name, point)
    retried, *others = points
    for name in others:
        pbt.record(name, report(points[name], 1))
        pbt.record(name, report(points[name], 2))
    pbt.mark_ended(retried)
    pbt.mark_running(retried)
    assert decide(pbt) == []
    assert pbt.is_far_ahead(others[0])
    pbt.record(retried, report(points[retried], 1))
    assert len(decide(pbt)) == 2
    assert not pbt.is_far_ahead(others[0])


def test_children_have_distinct_values() -> None:
    space = {"sft.learning_rate": {"choice": [1e-5, 1e-4, 1e-3]}, "sft.tuner.lora.rank": {"int": [1, 64]}}
    for seed in range(30):
        pbt = Population(search(space=space, trials=8), "sft", NUM_EVALS, seed)
        points = {f"trial-{number}": {"sft.learning_rate": 1e-4, "sft.tuner.lora.rank": number} for number in range(8)}
        for index, (name, point) in enumerate(points.items()):
            pbt.add_member(name, point)
            pbt.record(name, {"sft.eval_loss": index, "steps": 10.0, "share": 0.2})
        names = [trial_id(exploit.overrides) for exploit in decide(pbt)]
        assert len(set(names)) == len(names)


def test_population_is_complete_when_all_members_exist_or_none_can_be_added() -> None:
    pbt = population(trials=SIZE + 1)
    for point in initial_points():
        pbt.add_member(trial_id(point), point)
        pbt.record(trial_id(point), report(point, 1))
    assert decide(pbt) == []
    pbt.mark_complete()
    assert len(decide(pbt)) == 2


@pytest.mark.parametrize("interval", [1, 4])
def test_member_with_few_steps_does_not_block_the_others(interval: int) -> None:
    """`interval`: the other members report this many times as often."""
    pbt = population(trials=4)
    points = {trial_id(point): point for point in initial_points()[:4]}
    for name, point in points.items():
        pbt.add_member(name, point)
    short, *others = points
    steps = evenly_spaced_steps(3, NUM_EVALS)
    assert steps == [1, 2, 3]
    pending = {name: list(range(1, NUM_EVALS)) for name in others}
    reports = [{"sft.eval_loss": 0.5, "steps": float(step), "share": step / 3} for step in steps[:-1]]
    for iteration in range(40):
        if reports and not pbt.is_far_ahead(short) and iteration % interval == 0:
            pbt.record(short, reports.pop(0))
        for name in others:
            if pending[name] and not pbt.is_far_ahead(name) and name not in pbt.replaced:
                pbt.record(name, report(points[name], pending[name].pop(0)))
        for exploit in decide(pbt):
            others.append(trial_id(exploit.overrides))
            points[others[-1]] = exploit.overrides
            pending[others[-1]] = list(
                range(round(exploit.overrides["sft.schedule_overrides"][-1]["after"] * 5) + 1, NUM_EVALS)
            )
        if pbt.is_far_ahead(short):
            assert pbt.awaits_decision(short), "a paused member must wait for a decision"
        elif not reports:
            pbt.mark_ended(short)
    assert not [name for name in others if pending[name] and name not in pbt.replaced]
