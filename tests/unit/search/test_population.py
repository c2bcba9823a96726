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
from tunery.training.batches import at_even_steps
from tunery.training.schedule import override_step, schedule

SPACE: dict[str, Any] = {
    "sft.learning_rate": {"loguniform": [1e-5, 1e-2]},
    "sft.weight_decay": {"choice": [0.0, 0.01, 0.1]},
    "sft.tuner.lora.rank": {"choice": [4, 8]},
}
EVALUATIONS, STEPS, SIZE = 5, 50, 8


def search(**fields: Any) -> Search:
    fields = {"metric": "sft.eval_loss", "mode": "min", "trials": SIZE, "scheduler": "pbt", "space": SPACE, **fields}
    return Search.model_validate_json(json.dumps(fields))


def population(**fields: Any) -> Population:
    return Population(search(**fields), "sft", EVALUATIONS, seed=7)


def report(point: Point, generation: int) -> dict[str, float]:
    """The nearer to 1e-3 a trial has learned, the less is its loss."""
    rates = [point["sft.learning_rate"]]
    for change in point.get("sft.schedule_overrides", ()):
        rates += [change["learning_rate"]] * (change["after"] < generation / EVALUATIONS)
    loss = sum(abs(math.log10(rate) + 3) for rate in rates) / len(rates)
    step = at_even_steps(STEPS, EVALUATIONS)[generation - 1]
    return {"sft.eval_loss": loss, "steps": float(step), "share": step / STEPS}


def lived(pbt: Population, order: Callable[[list[str]], list[str]]) -> list[Exploit]:
    """Everybody trains to the end; each turn one of those that can go on reports."""
    points = {trial_id(point): point for point in starts()}
    for name, point in points.items():
        pbt.add_member(name, point)
    ahead = dict.fromkeys(points, 1)
    found: list[Exploit] = []
    while going := order([name for name in ahead if name not in pbt.replaced and ahead[name] < EVALUATIONS]):
        name = going[0]
        pbt.record(name, report(points[name], ahead[name]))
        ahead[name] += 1
        for exploit in due(pbt):
            found.append(exploit)
            child = trial_id(exploit.overrides)
            points[child] = exploit.overrides
            ahead[child] = round(exploit.overrides["sft.schedule_overrides"][-1]["after"] * EVALUATIONS) + 1
    return found


def due(pbt: Population) -> list[Exploit]:
    pbt.decide()
    found, pbt.pending_children = pbt.pending_children, []
    assert [exploit.member for exploit in found] == pbt.to_stop
    pbt.to_stop.clear()
    return found


def starts() -> list[Point]:
    return [random_point(search().space, 7, number, {}) for number in range(SIZE)]


def shuffled(seed: int) -> Callable[[list[str]], list[str]]:
    chance = random.Random(seed)
    return lambda names: chance.sample(names, len(names))


@pytest.mark.parametrize("seed", range(5))
def test_who_makes_room_does_not_depend_on_who_is_faster(seed: int) -> None:
    in_step = lived(population(), lambda names: names)
    assert len(in_step) == (EVALUATIONS - 1) * SIZE // 4
    assert lived(population(), shuffled(seed)) == in_step


def test_the_worst_quarter_goes_on_from_the_best_one_with_other_values() -> None:
    pbt = population()
    first = {trial_id(point): point for point in starts()}
    found = [
        exploit for exploit in lived(pbt, lambda names: names) if len(exploit.overrides["sft.schedule_overrides"]) == 1
    ]
    found = [exploit for exploit in found if exploit.overrides["sft.schedule_overrides"][0]["after"] == 0.2]
    losses = {name: report(point, 1)["sft.eval_loss"] for name, point in first.items()}
    ranked = sorted(losses, key=lambda name: losses[name])
    assert {exploit.member for exploit in found} == set(ranked[-2:])
    assert {exploit.source for exploit in found} <= set(ranked[:2])
    for exploit in found:
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


def test_what_is_found_is_a_training_whose_change_comes_behind_the_evaluation() -> None:
    (change,) = lived(population(), lambda names: names)[0].overrides["sft.schedule_overrides"]
    assert change["after"] == 1 / EVALUATIONS
    for evaluations in range(2, 13):
        for steps in (12, 50, 51, 99, 300):
            evaluated = at_even_steps(steps, evaluations)[:-1]
            assert [override_step(g / evaluations, steps) for g in range(1, evaluations)] == evaluated
    fields = {"kind": "sft", "data": "a", "model": "b", "epochs": 1, "learning_rate": 1e-3, "schedule": "constant"}
    spec = Sft.model_validate_json(json.dumps({**fields, "warmup": 0, "schedule_overrides": [change]}))
    rates = schedule(spec, STEPS).learning_rates
    assert rates == (1e-3,) * 10 + (change["learning_rate"],) * 40


def test_a_journal_tells_it_all_again(tmp_path: Path) -> None:
    journal, pbt = Journal(tmp_path / "journal.jsonl"), population()
    points = {trial_id(point): point for point in starts()}
    for number, (name, point) in enumerate(points.items()):
        journal.begin(TrialStart(name, number, point, "drawn"))
        pbt.add_member(name, point)
    for name, point in points.items():
        for generation in (1, 2):  # nobody waits for the decision
            journal.report(name, report(point, generation))
            pbt.record(name, report(point, generation))
    found = due(pbt)
    for exploit in found[:1]:  # the search was killed before the other had begun
        journal.begin(
            TrialStart(
                trial_id(exploit.overrides), 9, exploit.overrides, "descendant", exploit.source, exploit.source_step
            )
        )
        journal.end(exploit.member, state="stopped", values={}, seconds=1.0, error="")
    again = population()
    again.replay(Journal(tmp_path / "journal.jsonl").records.values())
    assert again.pending_children == found
    assert again.to_stop == [exploit.member for exploit in found]
    assert again.replaced == pbt.replaced


def test_one_that_fails_is_not_waited_for_and_one_without_a_value_makes_room() -> None:
    pbt = population()
    points = {trial_id(point): point for point in starts()}
    for name, point in points.items():
        pbt.add_member(name, point)
    failed, diverged, *others = points
    pbt.record(diverged, {**report(points[diverged], 1), "sft.eval_loss": math.nan})
    for name in others:
        pbt.record(name, report(points[name], 1))
    assert due(pbt) == [], "one has neither reported nor ended"
    assert pbt.awaits_decision(diverged)
    pbt.mark_ended(failed)
    leaving = {exploit.member for exploit in due(pbt)}
    assert diverged in leaving
    assert failed not in leaving
    assert not pbt.awaits_decision(others[0])
    assert pbt.stale_checkpoints() == [], "the copies have not begun yet"


def test_one_that_is_tried_again_is_waited_for() -> None:
    pbt = population()
    points = {trial_id(point): point for point in starts()}
    for name, point in points.items():
        pbt.add_member(name, point)
    tried, *others = points
    for name in others:
        pbt.record(name, report(points[name], 1))
        pbt.record(name, report(points[name], 2))
    pbt.mark_ended(tried)
    pbt.mark_running(tried)
    assert due(pbt) == []
    assert pbt.is_far_ahead(others[0])
    pbt.record(tried, report(points[tried], 1))
    assert len(due(pbt)) == 2
    assert not pbt.is_far_ahead(others[0])


def test_two_copies_are_never_the_same() -> None:
    space = {"sft.learning_rate": {"choice": [1e-5, 1e-4, 1e-3]}, "sft.tuner.lora.rank": {"int": [1, 64]}}
    for seed in range(30):
        pbt = Population(search(space=space, trials=8), "sft", EVALUATIONS, seed)
        points = {f"trial-{number}": {"sft.learning_rate": 1e-4, "sft.tuner.lora.rank": number} for number in range(8)}
        for place, (name, point) in enumerate(points.items()):
            pbt.add_member(name, point)
            pbt.record(name, {"sft.eval_loss": place, "steps": 10.0, "share": 0.2})
        names = [trial_id(exploit.overrides) for exploit in due(pbt)]
        assert len(set(names)) == len(names)


def test_a_population_is_whole_when_all_are_there_or_no_more_can_come() -> None:
    pbt = population(trials=SIZE + 1)
    for point in starts():
        pbt.add_member(trial_id(point), point)
        pbt.record(trial_id(point), report(point, 1))
    assert due(pbt) == []
    pbt.mark_complete()
    assert len(due(pbt)) == 2


@pytest.mark.parametrize("pause", [1, 4])
def test_a_member_of_fewer_steps_than_evaluations_keeps_nobody_waiting(pause: int) -> None:
    """`pause`: the others report so many times as often."""
    pbt = population(trials=4)
    points = {trial_id(point): point for point in starts()[:4]}
    for name, point in points.items():
        pbt.add_member(name, point)
    short, *others = points
    steps = at_even_steps(3, EVALUATIONS)
    assert steps == [1, 2, 3]
    pending = {name: list(range(1, EVALUATIONS)) for name in others}
    ahead = [{"sft.eval_loss": 0.5, "steps": float(step), "share": step / 3} for step in steps[:-1]]
    for turn in range(40):
        if ahead and not pbt.is_far_ahead(short) and turn % pause == 0:
            pbt.record(short, ahead.pop(0))
        for name in others:
            if pending[name] and not pbt.is_far_ahead(name) and name not in pbt.replaced:
                pbt.record(name, report(points[name], pending[name].pop(0)))
        for exploit in due(pbt):
            others.append(trial_id(exploit.overrides))
            points[others[-1]] = exploit.overrides
            pending[others[-1]] = list(
                range(round(exploit.overrides["sft.schedule_overrides"][-1]["after"] * 5) + 1, EVALUATIONS)
            )
        if pbt.is_far_ahead(short):
            assert pbt.awaits_decision(short), "else it is paused, begun again, and paused again"
        elif not ahead:
            pbt.mark_ended(short)
    assert not [name for name in others if pending[name] and name not in pbt.replaced]
