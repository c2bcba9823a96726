"""Sampling of trials: algorithms, conditional dimensions, and the same trials after a kill."""

from __future__ import annotations

import json
import math
import resource
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from experiment_text import LoadText

from tunery.errors import SpecErrors
from tunery.run import before_search
from tunery.search.journal import Journal, TrialStart
from tunery.search.queue import Queue
from tunery.search.space import (
    estimate_max_progress,
    grid,
    grid_point,
    sample_point,
    seeded_sampler,
    trial_experiment,
    unfiltered_stages,
    with_seed,
)
from tunery.search.steering import SearchControl
from tunery.search.suggest import suggester
from tunery.spec import Dimension, Search

SPACE: dict[str, Any] = {
    "sft.learning_rate": {"loguniform": [1e-5, 1e-2]},
    "sft.tuner": {"choice": ["full", {"lora": {"rank": 8}}]},
    "sft.tuner.lora.rank": {"int": [4, 17], "step": 4, "when": {"sft.tuner": {"lora": {"rank": 8}}}},
    "sft.tuner.lora.dropout": {"uniform": [0.0, 0.5], "step": 0.1, "when": {"sft.tuner.lora.rank": [4, 8]}},
    "sft.epochs": {"grid": [1, 2]},
    "sft.schedule": {"grid": ["cosine", "linear"]},
}


def search(**fields: Any) -> Search:
    told = {"metric": "sft.eval_loss", "mode": "min", "trials": 40, "space": SPACE, **fields}
    return Search.model_validate_json(json.dumps(told))


def drawn(number: int, space: dict[str, Dimension]) -> dict[str, Any]:
    return sample_point(space, seeded_sampler(7, number))


def test_values_are_within_their_dimension_and_only_there_when_their_conditions_hold() -> None:
    space = search().space
    points = [drawn(number, space) for number in range(300)]
    ranks = Counter(found.get("sft.tuner.lora.rank") for found in points)
    assert set(ranks) == {None, 4, 8, 12, 16}
    assert {found.get("sft.tuner.lora.dropout") for found in points} == {None, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    for found in points:
        assert all(space[path].contains(value) for path, value in found.items())
        assert ("sft.tuner.lora.rank" in found) == (found["sft.tuner"] != "full")
        assert ("sft.tuner.lora.dropout" in found) == (found.get("sft.tuner.lora.rank") in (4, 8))
        assert list(found) == [path for path in space if path in found], "in the order of the file"
    assert 0.2 < sum(found["sft.learning_rate"] < 1e-4 for found in points) / 300 < 0.5, "uniform in the logarithm"


def test_what_is_drawn_depends_on_the_number_alone() -> None:
    space = search().space
    assert drawn(5, space) == drawn(5, space) != drawn(6, space)
    fewer = {path: dimension for path, dimension in space.items() if path != "sft.epochs"}
    assert drawn(5, fewer) == {path: value for path, value in drawn(5, space).items() if path != "sft.epochs"}


def test_grids_are_taken_in_turn_and_a_whole_grid_has_each_trial_once() -> None:
    space = search().space
    counted = Counter(tuple(grid_point(space, number).values()) for number in range(40))
    assert set(counted.values()) == {10}
    assert len(counted) == 4
    whole = {path: dimension for path, dimension in space.items() if path != "sft.learning_rate"}
    points = list(grid(whole))
    # full, or 4 ranks, of which two have 6 dropouts; times 4 of the grids
    assert len(points) == (1 + 2 + 2 * 6) * 4
    assert len({json.dumps(found) for found in points}) == len(points)


EXPERIMENT = """
name: x
seed: 17
stages:
  docs: {kind: dataset, source: "builtin:python-docs", subset: texts, split: train, limit: 10}
  base: {kind: pretrain, data: docs, model: {scratch: tiny}, epochs: 1, learning_rate: 1e-3}
  rows: {kind: dataset, source: "builtin:python-docs", subset: questions, split: train, limit: 10}
  held: {kind: dataset, source: "builtin:python-docs", subset: questions, split: test, limit: 10}
  sft:  {kind: sft, data: rows, model: base, epochs: 1, learning_rate: 1e-3, eval_data: held, seed: 3}
  eval: {kind: evaluate, models: [base, sft], data: {a: held, b: rows}, baseline: base}
search:
  metric: sft.eval_loss
  mode: min
  trials: 4
  constraints: [{metric: eval.sft.a.forgetting, max: 0.02}]
  space:
    sft.learning_rate: {choice: [1e-3, 1e-4]}
"""


def test_a_trial_has_what_all_metrics_need_and_no_more(load_text: LoadText) -> None:
    experiment, _ = load_text(EXPERIMENT)
    trial = trial_experiment(experiment, {"sft.learning_rate": 1e-4})
    evaluation: Any = trial.stages["eval"]
    assert set(evaluation.data) == {"a"}
    assert evaluation.models == ("base", "sft")
    assert set(trial.stages) == {"docs", "base", "rows", "held", "sft", "eval"}


def test_before_a_search_all_is_made_that_no_searched_training_changes(load_text: LoadText) -> None:
    experiment, _ = load_text(EXPERIMENT)
    assert list(before_search(experiment).stages) == ["docs", "base", "rows", "held"]
    alone = experiment.model_copy(update={"search": None})
    assert before_search(alone) is alone
    searched, _ = load_text(EXPERIMENT.replace("sft.learning_rate:", "base.learning_rate:"))
    assert list(before_search(searched).stages) == ["docs", "rows", "held"]


def test_another_seed_is_that_of_the_trainings_that_the_search_changes(load_text: LoadText) -> None:
    experiment, _ = load_text(EXPERIMENT)
    assert with_seed(experiment, {"sft.learning_rate": 1e-4}, 0) == {"sft.learning_rate": 1e-4}
    assert with_seed(experiment, {"sft.learning_rate": 1e-4}, 2) == {"sft.learning_rate": 1e-4, "sft.seed": 2003}


EVALUATED = EXPERIMENT[EXPERIMENT.index("seed: 3}") : EXPERIMENT.index("search:")] + "search:"
MISTAKES: dict[str, tuple[str, str, list[str]]] = {
    "field that does not exist": ("sft.learning_rate: {choice", "sft.lerning_rate: {choice", ["did you mean"]),
    "range upside down": ("{choice: [1e-3, 1e-4]}", "{uniform: [2e-3, 1e-3]}", ["is empty"]),
    "logarithm of nothing": ("{choice: [1e-3, 1e-4]}", "{loguniform: [0, 1e-3]}", ["starts at 0"]),
    "step too long": ("{choice: [1e-3, 1e-4]}", "{uniform: [1e-4, 1e-3], step: 1}", ["larger than the range"]),
    "step of a choice": ("{choice: [1e-3, 1e-4]}", "{choice: [1e-3], step: 1}", ["not for `choice`"]),
    "metric that nobody logs": ("eval.sft.a.forgetting", "eval.sft.c.forgetting", ["no stage logs", "did you mean"]),
    "weights of some": (
        "  space:",
        "  objectives: [{metric: eval.sft.a.loss, mode: min, weight: 1},"
        " {metric: eval.sft.b.loss, mode: min}]\n  space:",
        ["set it for all or none"],
    ),
    "bounds that nothing meets": ("max: 0.02", "max: 0.02, min: 1", ["`min` 1 is above `max` 0.02"]),
    "scheduler of an end": ("metric: sft.eval_loss", "scheduler: median\n  metric: eval.sft.a.loss", ["once, after"]),
    "scheduler with nothing to judge by": (
        EVALUATED,
        EVALUATED.replace("3}", "3, num_evals: 1}") + "\n  scheduler: asha",
        ["evaluates once, at its end (`num_evals: 1`)", "increase `num_evals`"],
    ),
    "population with nothing to change": (
        "sft.learning_rate: {choice: [1e-3, 1e-4]}",
        "sft.epochs: {choice: [1, 2]}\n  scheduler: pbt",
        ["pbt has no dimension", "`sft.learning_rate`"],
    ),
    "population of one": ("  trials: 4", "  scheduler: pbt\n  trials: 1", ["no other trial to copy"]),
    "population that changes when it evaluates": (
        "  space:",
        "  scheduler: pbt\n  space:\n    sft.num_evals: {choice: [2, 3]}",
        ["can't search `sft.num_evals`"],
    ),
    "population with a rate that is there in some": (
        "1e-4]}",
        "auto]}\n  scheduler: pbt",
        ["pbt can't change `sft.learning_rate`", "`auto` is not a number"],
    ),
    "condition on no dimension": (
        "1e-4]}",
        "1e-4], when: {sft.epochs: 1}}",
        ["depends on `sft.epochs`, which is not a dimension"],
    ),
    "condition on a value that is not there": (
        "1e-4]}",
        "1e-4]}\n    sft.epochs: {choice: [1, 2], when: {sft.learning_rate: 5}}",
        ["to be 5, which is not in its dimension", "choice [0.001, 0.0001]"],
    ),
    "conditions in a circle": (
        "1e-4]}",
        "1e-4], when: {sft.epochs: 1}}\n    sft.epochs: {choice: [1, 2], when: {sft.learning_rate: 1e-3}}",
        ["depends on itself"],
    ),
    "first point outside": (
        "  space:",
        "  initial_points: [{sft.learning_rate: 1}]\n  space:",
        ["can't be 1", "choice"],
    ),
    "first point of no dimension": (
        "  space:",
        "  initial_points: [{sft.epochs: 1}]\n  space:",
        ["is not a dimension"],
    ),
}


@pytest.mark.parametrize(("old", "new", "told"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_told_with_their_line(old: str, new: str, told: list[str], load_text: LoadText) -> None:
    assert EXPERIMENT.count(old) == 1
    with pytest.raises(SpecErrors) as caught:
        load_text(EXPERIMENT.replace(old, new))
    text = str(caught.value)
    assert "exp.yaml:" in text
    for part in told:
        assert part in text


# Algorithms, and what is next.


def quality(found: dict[str, Any]) -> float:
    """Best at a learning rate of 1e-3, without a tuner."""
    return abs(found["sft.learning_rate"] - 1e-3) * 100 + (found["sft.tuner"] != "full")


Stop = Callable[[int], bool]


class Bench:
    """A search as Tune drives it, a trial at a time."""

    def __init__(self, folder: Path, told: Search) -> None:
        self.folder, self.told = folder, told
        self.run = folder / "run"
        self.begin()

    def begin(self) -> None:
        """Also again, after a kill."""
        self.journal = Journal(self.folder / "journal.jsonl")
        self.control = SearchControl(self.run)
        self.queue = Queue(
            self.told,
            self.journal,
            suggester(self.told, 3, self.folder, []),
            self.control,
            max_concurrent=2,
            with_seed=lambda overrides, seed: {**overrides, "sft.seed": seed},
        )
        self.number = 0

    def next(self) -> Any:
        self.number += 1
        return self.queue.suggest(f"tune{self.number}"), f"tune{self.number}"

    def end(self, config: dict[str, Any], tune_id: str, state: str = "done") -> None:
        value = quality(config["overrides"])
        values = dict.fromkeys(self.told.metrics, value)
        self.journal.end(config["trial"], state=state, values=values, seconds=1.0, error="")
        self.queue.on_trial_complete(tune_id)

    def all(self, kill_at: int | None = None) -> list[dict[str, Any]]:
        found = []
        while (asked := self.next())[0] != "FINISHED":
            assert asked[0] is not None
            if len(found) == kill_at:
                kill_at = None
                self.begin()
                continue
            self.end(*asked)
            found.append(asked[0]["overrides"])
        return found


@pytest.mark.parametrize("algorithm", ["random", "tpe", "nsga2"])
def test_a_killed_search_goes_on_as_it_would_have_gone(algorithm: str, tmp_path: Path) -> None:
    told = search(algorithm=algorithm, trials=24)
    whole = Bench(tmp_path / "whole", told).all()
    killed = Bench(tmp_path / "killed", told).all(kill_at=13)
    assert killed == whole
    assert len({json.dumps(found) for found in whole}) == 24, "no trial is drawn twice"
    assert Counter((found["sft.epochs"], found["sft.schedule"]) for found in whole).most_common()[-1][1] == 6


def test_tpe_learns_what_is_good_and_chance_does_not(tmp_path: Path) -> None:
    def late(algorithm: str) -> float:
        found = Bench(tmp_path / algorithm, search(algorithm=algorithm, trials=60)).all()[30:]
        return sorted(map(quality, found))[15]

    assert late("tpe") < late("random") / 3


def test_first_points_come_first_and_a_grid_ends_by_itself(tmp_path: Path) -> None:
    first = [{"sft.learning_rate": 1e-3, "sft.tuner": "full"}]
    assert (
        first[0].items()
        <= Bench(tmp_path / "a", search(initial_points=first, algorithm="tpe", trials=3)).all()[0].items()
    )
    space = {"sft.epochs": {"choice": [1, 2, 3]}, "sft.schedule": {"choice": ["cosine", "linear"]}}
    told = search(
        space=space, algorithm="grid", trials=50, initial_points=[{"sft.epochs": 2, "sft.schedule": "linear"}]
    )
    bench = Bench(tmp_path / "b", told)
    found = []
    while (asked := bench.next())[0] != "FINISHED":
        found.append(tuple(asked[0]["overrides"].values()))
        bench.journal.end(asked[0]["trial"], state="done", values={"sft.eval_loss": 1.0}, seconds=1.0, error="")
        bench.queue.on_trial_complete(asked[1])
    assert found[0] == (2, "linear")
    assert sorted(found) == sorted((epochs, schedule) for epochs in (1, 2, 3) for schedule in ("cosine", "linear"))


def test_what_a_first_point_of_a_grid_leaves_out_is_as_in_a_combination_that_agrees(tmp_path: Path) -> None:
    space = {"sft.learning_rate": {"choice": [1, 2, 3]}, "sft.tuner": {"choice": ["full", "lora"]}}
    told = search(space=space, algorithm="grid", trials=6, initial_points=[{"sft.tuner": "lora"}])
    found = [tuple(overrides.values()) for overrides in Bench(tmp_path, told).all()]
    assert found[0] == (1, "lora")
    assert len(set(found)) == 6


def test_a_wide_range_of_whole_numbers_takes_no_room() -> None:
    dimension = Dimension.model_validate_json('{"int": [0, 2147483647], "step": 3}')
    assert dimension.values == (0, 2147483646)
    assert dimension.contains(9)
    assert dimension.contains(9.0)
    assert not any(map(dimension.contains, (10, 9.5, math.inf, math.nan, "9")))


def test_a_full_disk_leaves_no_half_line_in_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.begin(TrialStart("a", 0, {"x": 1}, "drawn"))
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limit[1]))
        with pytest.raises(OSError, match="too large"):
            journal.report("a", {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before


LONGEST: dict[str, tuple[dict[str, Any], float]] = {
    "tokens": ({"sft.learning_rate": {"choice": [1e-3]}}, 100 * 2 * 400),
    "longer rows": ({"sft.max_length": {"choice": [64, 1024]}}, 100 * 2 * 400),
    "shorter rows": ({"sft.max_length": {"choice": [64, 128]}}, 100 * 2 * 128),
    "more epochs": ({"sft.epochs": {"uniform": [1.0, 3.0]}}, 100 * 3 * 400),
}


@pytest.mark.parametrize("case", LONGEST)
def test_the_longest_trial_has_the_longest_rows_and_most_epochs(case: str, load_text: LoadText) -> None:
    experiment, _ = load_text(EXPERIMENT)
    sft: Any = experiment.stages["sft"].model_copy(update={"epochs": 2.0, "max_length": 2048})
    space, expected = LONGEST[case]
    assert experiment.search is not None
    told = experiment.search.model_copy(
        update={
            "metric": "sft.eval_loss",
            "space": {path: Dimension.model_validate_json(json.dumps(given)) for path, given in space.items()},
        }
    )
    changed = experiment.model_copy(update={"stages": {**experiment.stages, "sft": sft}, "search": told})
    assert estimate_max_progress(changed, rows=100, tokens_per_row=400.0) == expected


def test_rows_are_counted_before_a_selection_that_is_searched_and_after_one_that_is_not(load_text: LoadText) -> None:
    selected = """stages:
  scored: {kind: score, data: rows, by: [{length: words}]}
  clean: {kind: select, data: scored, keep: {length: {keep_fraction: 0.5}}}"""
    text = EXPERIMENT.replace("data: rows", "data: clean", 1).replace("stages:", selected, 1)
    experiment, _ = load_text(text)
    assert unfiltered_stages(experiment, "sft") == ["clean"]
    searched, _ = load_text(
        text.replace(
            "sft.learning_rate: {choice: [1e-3, 1e-4]}", "clean.keep.length.keep_fraction: {choice: [0.3, 1.0]}"
        )
    )
    assert unfiltered_stages(searched, "sft") == ["rows"]


def test_the_best_are_repeated_with_other_seeds_once_all_have_ended(tmp_path: Path) -> None:
    bench = Bench(tmp_path, search(trials=5, num_seeds=3, replicate_top_k=2))
    found = bench.all(kill_at=6)
    assert len(found) == 5 + 2 * 2
    best = sorted(found[:5], key=quality)[:2]
    assert [{**one, "sft.seed": seed} for one in best for seed in (1, 2)] == found[5:]


def test_wished_trials_are_run_and_stopped_ones_are_not(tmp_path: Path) -> None:
    bench = Bench(tmp_path, search(trials=2))
    one, two = bench.next(), bench.next()
    assert bench.next()[0] is None, "two at once"
    bench.end(*one)
    bench.control.add_trial({"sft.learning_rate": 0.5}, "cloned", one[0]["trial"])
    bench.control.add_trial({"sft.learning_rate": 0.6})
    asked = bench.next()
    assert (asked[0]["overrides"], asked[0]["origin"]) == ({"sft.learning_rate": 0.5}, "cloned")
    waiting = bench.journal.open_trials[-1]
    assert waiting.overrides == {"sft.learning_rate": 0.6}
    bench.control.request_stop(waiting.trial)
    bench.queue._running.clear()
    assert bench.next()[0] == "FINISHED"
    assert bench.journal.records[waiting.trial].outcome["state"] == "stopped"  # type: ignore[index]
    assert two[0]["trial"] != one[0]["trial"]


def test_a_wish_that_fits_the_file_no_more_fails_and_the_search_goes_on(tmp_path: Path) -> None:
    told: list[TrialStart] = []
    bench = Bench(tmp_path, search(trials=1))
    bench.queue = Queue(
        bench.told,
        bench.journal,
        suggester(bench.told, 3, tmp_path, []),
        bench.control,
        max_concurrent=2,
        with_seed=lambda overrides, seed: overrides,
        on_untracked_end=told.append,
        invalid_reason=lambda overrides: "there is no `gone`" if "sft.gone" in overrides else "",
    )
    bench.control.add_trial({"sft.gone": 1})
    bench.end(*bench.next())
    assert bench.next()[0] == "FINISHED"
    assert [begun.overrides for begun in told] == [{"sft.gone": 1}]
    ended = bench.journal.records[told[0].trial].outcome
    assert ended is not None
    assert (ended["state"], ended["error"]) == ("failed", "there is no `gone`")


def test_half_a_line_of_a_killed_writer_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.begin(TrialStart("a", 0, {"x": 1}, "drawn"))
    journal.report("a", {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"event": "ended", "tri')
    again = Journal(path)
    assert [begun.trial for begun in again.open_trials] == ["a"]
    again.end("a", state="done", values={"loss": 0.5}, seconds=1.0, error="")
    assert Journal(path).records["a"].outcome == {"state": "done", "values": {"loss": 0.5}, "seconds": 1.0, "error": ""}
    assert Journal(path).records["a"].reports == [{"loss": 1.0}]
