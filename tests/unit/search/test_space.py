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
    result = {"metric": "sft.eval_loss", "mode": "min", "trials": 40, "space": SPACE, **fields}
    return Search.model_validate_json(json.dumps(result))


def sampled_point(number: int, space: dict[str, Dimension]) -> dict[str, Any]:
    return sample_point(space, seeded_sampler(7, number))


def test_values_are_within_their_dimension_and_respect_conditions() -> None:
    space = search().space
    points = [sampled_point(number, space) for number in range(300)]
    ranks = Counter(item.get("sft.tuner.lora.rank") for item in points)
    assert set(ranks) == {None, 4, 8, 12, 16}
    assert {item.get("sft.tuner.lora.dropout") for item in points} == {None, 0.0, 0.1, 0.2, 0.3, 0.4, 0.5}
    for item in points:
        assert all(space[path].contains(value) for path, value in item.items())
        assert ("sft.tuner.lora.rank" in item) == (item["sft.tuner"] != "full")
        assert ("sft.tuner.lora.dropout" in item) == (item.get("sft.tuner.lora.rank") in (4, 8))
        assert list(item) == [path for path in space if path in item], "in the order of the file"
    assert 0.2 < sum(item["sft.learning_rate"] < 1e-4 for item in points) / 300 < 0.5, "log-uniform"


def test_sampled_values_depend_only_on_the_trial_number() -> None:
    space = search().space
    assert sampled_point(5, space) == sampled_point(5, space) != sampled_point(6, space)
    without_epochs = {path: dimension for path, dimension in space.items() if path != "sft.epochs"}
    assert sampled_point(5, without_epochs) == {
        path: value for path, value in sampled_point(5, space).items() if path != "sft.epochs"
    }


def test_grid_points_cycle_and_a_complete_grid_has_each_trial_once() -> None:
    space = search().space
    counts = Counter(tuple(grid_point(space, number).values()) for number in range(40))
    assert set(counts.values()) == {10}
    assert len(counts) == 4
    without_rate = {path: dimension for path, dimension in space.items() if path != "sft.learning_rate"}
    points = list(grid(without_rate))
    # Full fine-tuning, or 4 ranks, of which two have 6 dropouts each; times 4 points of the grids.
    assert len(points) == (1 + 2 + 2 * 6) * 4
    assert len({json.dumps(item) for item in points}) == len(points)


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


def test_trial_has_exactly_the_stages_that_its_metrics_need(load_text: LoadText) -> None:
    experiment, _ = load_text(EXPERIMENT)
    trial = trial_experiment(experiment, {"sft.learning_rate": 1e-4})
    evaluation: Any = trial.stages["eval"]
    assert set(evaluation.data) == {"a"}
    assert evaluation.models == ("base", "sft")
    assert set(trial.stages) == {"docs", "base", "rows", "held", "sft", "eval"}


def test_stages_that_the_search_does_not_change_are_built_before_it(load_text: LoadText) -> None:
    experiment, _ = load_text(EXPERIMENT)
    assert list(before_search(experiment).stages) == ["docs", "base", "rows", "held"]
    without_search = experiment.model_copy(update={"search": None})
    assert before_search(without_search) is without_search
    searched, _ = load_text(EXPERIMENT.replace("sft.learning_rate:", "base.learning_rate:"))
    assert list(before_search(searched).stages) == ["docs", "rows", "held"]


def test_replicate_seed_applies_to_searched_trainings(load_text: LoadText) -> None:
    experiment, _ = load_text(EXPERIMENT)
    assert with_seed(experiment, {"sft.learning_rate": 1e-4}, 0) == {"sft.learning_rate": 1e-4}
    assert with_seed(experiment, {"sft.learning_rate": 1e-4}, 2) == {"sft.learning_rate": 1e-4, "sft.seed": 2003}


SFT_AND_EVALUATION = EXPERIMENT[EXPERIMENT.index("seed: 3}") : EXPERIMENT.index("search:")] + "search:"
INVALID: dict[str, tuple[str, str, list[str]]] = {
    "unknown field": ("sft.learning_rate: {choice", "sft.lerning_rate: {choice", ["did you mean"]),
    "descending range": ("{choice: [1e-3, 1e-4]}", "{uniform: [2e-3, 1e-3]}", ["is empty"]),
    "logarithm of zero": ("{choice: [1e-3, 1e-4]}", "{loguniform: [0, 1e-3]}", ["starts at 0"]),
    "step larger than the range": (
        "{choice: [1e-3, 1e-4]}",
        "{uniform: [1e-4, 1e-3], step: 1}",
        ["larger than the range"],
    ),
    "step of a choice": ("{choice: [1e-3, 1e-4]}", "{choice: [1e-3], step: 1}", ["not for `choice`"]),
    "metric that is not logged": ("eval.sft.a.forgetting", "eval.sft.c.forgetting", ["no stage logs", "did you mean"]),
    "weights of some metrics only": (
        "  space:",
        "  objectives: [{metric: eval.sft.a.loss, mode: min, weight: 1},"
        " {metric: eval.sft.b.loss, mode: min}]\n  space:",
        ["set it for all or none"],
    ),
    "contradictory bounds": ("max: 0.02", "max: 0.02, min: 1", ["`min` 1 is above `max` 0.02"]),
    "scheduler by a metric after the training": (
        "metric: sft.eval_loss",
        "scheduler: median\n  metric: eval.sft.a.loss",
        ["once, after"],
    ),
    "scheduler with a single evaluation": (
        SFT_AND_EVALUATION,
        SFT_AND_EVALUATION.replace("3}", "3, num_evals: 1}") + "\n  scheduler: asha",
        ["evaluates once, at its end (`num_evals: 1`)", "increase `num_evals`"],
    ),
    "population without a dimension to change": (
        "sft.learning_rate: {choice: [1e-3, 1e-4]}",
        "sft.epochs: {choice: [1, 2]}\n  scheduler: pbt",
        ["pbt has no dimension", "`sft.learning_rate`"],
    ),
    "population of one": ("  trials: 4", "  scheduler: pbt\n  trials: 1", ["no other trial to copy"]),
    "population with searched num_evals": (
        "  space:",
        "  scheduler: pbt\n  space:\n    sft.num_evals: {choice: [2, 3]}",
        ["can't search `sft.num_evals`"],
    ),
    "population with a rate that may be auto": (
        "1e-4]}",
        "auto]}\n  scheduler: pbt",
        ["pbt can't change `sft.learning_rate`", "`auto` is not a number"],
    ),
    "condition on an unknown dimension": (
        "1e-4]}",
        "1e-4], when: {sft.epochs: 1}}",
        ["depends on `sft.epochs`, which is not a dimension"],
    ),
    "condition on a value outside the dimension": (
        "1e-4]}",
        "1e-4]}\n    sft.epochs: {choice: [1, 2], when: {sft.learning_rate: 5}}",
        ["to be 5, which is not in its dimension", "choice [0.001, 0.0001]"],
    ),
    "cyclic conditions": (
        "1e-4]}",
        "1e-4], when: {sft.epochs: 1}}\n    sft.epochs: {choice: [1, 2], when: {sft.learning_rate: 1e-3}}",
        ["depends on itself"],
    ),
    "initial point outside its dimension": (
        "  space:",
        "  initial_points: [{sft.learning_rate: 1}]\n  space:",
        ["can't be 1", "choice"],
    ),
    "initial point of an unknown dimension": (
        "  space:",
        "  initial_points: [{sft.epochs: 1}]\n  space:",
        ["is not a dimension"],
    ),
}


@pytest.mark.parametrize(("old", "new", "expected"), INVALID.values(), ids=INVALID)
def test_errors_are_reported_with_their_line(old: str, new: str, expected: list[str], load_text: LoadText) -> None:
    assert EXPERIMENT.count(old) == 1
    with pytest.raises(SpecErrors) as caught:
        load_text(EXPERIMENT.replace(old, new))
    text = str(caught.value)
    assert "exp.yaml:" in text
    for words in expected:
        assert words in text


# Algorithms and the queue.


def loss_of(point: dict[str, Any]) -> float:
    """Return a loss that is lowest at a learning rate of 1e-3 without a tuner."""
    return abs(point["sft.learning_rate"] - 1e-3) * 100 + (point["sft.tuner"] != "full")


Stop = Callable[[int], bool]


class QueueHarness:
    """Drives a search like Tune, one trial at a time."""

    def __init__(self, folder: Path, search: Search) -> None:
        self.folder, self.search = folder, search
        self.run = folder / "run"
        self.begin()

    def begin(self) -> None:
        """Open the search, also again after a kill."""
        self.journal = Journal(self.folder / "journal.jsonl")
        self.control = SearchControl(self.run)
        self.queue = Queue(
            self.search,
            self.journal,
            suggester(self.search, 3, self.folder, []),
            self.control,
            max_concurrent=2,
            with_seed=lambda overrides, seed: {**overrides, "sft.seed": seed},
        )
        self.number = 0

    def next(self) -> Any:
        self.number += 1
        return self.queue.suggest(f"tune{self.number}"), f"tune{self.number}"

    def end(self, config: dict[str, Any], tune_id: str, state: str = "done") -> None:
        value = loss_of(config["overrides"])
        values = dict.fromkeys(self.search.metrics, value)
        self.journal.end(config["trial"], state=state, values=values, seconds=1.0, error="")
        self.queue.on_trial_complete(tune_id)

    def all(self, kill_at: int | None = None) -> list[dict[str, Any]]:
        results = []
        while (requested := self.next())[0] != "FINISHED":
            assert requested[0] is not None
            if len(results) == kill_at:
                kill_at = None
                self.begin()
                continue
            self.end(*requested)
            results.append(requested[0]["overrides"])
        return results


@pytest.mark.parametrize("algorithm", ["random", "tpe", "nsga2"])
def test_resumed_search_continues_as_without_the_kill(algorithm: str, tmp_path: Path) -> None:
    result = search(algorithm=algorithm, trials=24)
    uninterrupted = QueueHarness(tmp_path / "uninterrupted", result).all()
    killed = QueueHarness(tmp_path / "killed", result).all(kill_at=13)
    assert killed == uninterrupted
    assert len({json.dumps(item) for item in uninterrupted}) == 24, "no trial is sampled twice"
    assert Counter((item["sft.epochs"], item["sft.schedule"]) for item in uninterrupted).most_common()[-1][1] == 6


def test_tpe_learns_and_random_search_does_not(tmp_path: Path) -> None:
    def median_of_second_half(algorithm: str) -> float:
        actual = QueueHarness(tmp_path / algorithm, search(algorithm=algorithm, trials=60)).all()[30:]
        return sorted(map(loss_of, actual))[15]

    assert median_of_second_half("tpe") < median_of_second_half("random") / 3


def test_initial_points_come_first_and_a_grid_is_exhausted(tmp_path: Path) -> None:
    first = [{"sft.learning_rate": 1e-3, "sft.tuner": "full"}]
    assert (
        first[0].items()
        <= QueueHarness(tmp_path / "a", search(initial_points=first, algorithm="tpe", trials=3)).all()[0].items()
    )
    space = {"sft.epochs": {"choice": [1, 2, 3]}, "sft.schedule": {"choice": ["cosine", "linear"]}}
    result = search(
        space=space, algorithm="grid", trials=50, initial_points=[{"sft.epochs": 2, "sft.schedule": "linear"}]
    )
    harness = QueueHarness(tmp_path / "b", result)
    results = []
    while (requested := harness.next())[0] != "FINISHED":
        results.append(tuple(requested[0]["overrides"].values()))
        harness.journal.end(requested[0]["trial"], state="done", values={"sft.eval_loss": 1.0}, seconds=1.0, error="")
        harness.queue.on_trial_complete(requested[1])
    assert results[0] == (2, "linear")
    assert sorted(results) == sorted((epochs, schedule) for epochs in (1, 2, 3) for schedule in ("cosine", "linear"))


def test_partial_initial_point_of_a_grid_is_completed(tmp_path: Path) -> None:
    space = {"sft.learning_rate": {"choice": [1, 2, 3]}, "sft.tuner": {"choice": ["full", "lora"]}}
    result = search(space=space, algorithm="grid", trials=6, initial_points=[{"sft.tuner": "lora"}])
    actual = [tuple(overrides.values()) for overrides in QueueHarness(tmp_path, result).all()]
    assert actual[0] == (1, "lora")
    assert len(set(actual)) == 6


def test_wide_integer_range_takes_little_memory() -> None:
    dimension = Dimension.model_validate_json('{"int": [0, 2147483647], "step": 3}')
    assert dimension.values == (0, 2147483646)
    assert dimension.contains(9)
    assert dimension.contains(9.0)
    assert not any(map(dimension.contains, (10, 9.5, math.inf, math.nan, "9")))


def test_full_disk_leaves_no_partial_journal_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.begin(TrialStart("a", 0, {"x": 1}, "sampled"))
    before = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous_handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 9, limit[1]))
        with pytest.raises(OSError, match="too large"):
            journal.report("a", {"loss": 1.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, previous_handler)
    assert path.read_bytes() == before


MAX_PROGRESS: dict[str, tuple[dict[str, Any], float]] = {
    "tokens": ({"sft.learning_rate": {"choice": [1e-3]}}, 100 * 2 * 400),
    "longer rows": ({"sft.max_length": {"choice": [64, 1024]}}, 100 * 2 * 400),
    "shorter rows": ({"sft.max_length": {"choice": [64, 128]}}, 100 * 2 * 128),
    "more epochs": ({"sft.epochs": {"uniform": [1.0, 3.0]}}, 100 * 3 * 400),
}


@pytest.mark.parametrize("case", MAX_PROGRESS)
def test_max_progress_uses_the_longest_rows_and_most_epochs(case: str, load_text: LoadText) -> None:
    experiment, _ = load_text(EXPERIMENT)
    sft: Any = experiment.stages["sft"].model_copy(update={"epochs": 2.0, "max_length": 2048})
    space, expected = MAX_PROGRESS[case]
    assert experiment.search is not None
    result = experiment.search.model_copy(
        update={
            "metric": "sft.eval_loss",
            "space": {path: Dimension.model_validate_json(json.dumps(dimension)) for path, dimension in space.items()},
        }
    )
    changed = experiment.model_copy(update={"stages": {**experiment.stages, "sft": sft}, "search": result})
    assert estimate_max_progress(changed, rows=100, tokens_per_row=400.0) == expected


def test_rows_are_counted_before_searched_and_after_fixed_selections(load_text: LoadText) -> None:
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


def test_best_trials_are_replicated_after_all_have_ended(tmp_path: Path) -> None:
    harness = QueueHarness(tmp_path, search(trials=5, num_seeds=3, replicate_top_k=2))
    actual = harness.all(kill_at=6)
    assert len(actual) == 5 + 2 * 2
    best = sorted(actual[:5], key=loss_of)[:2]
    assert [{**overrides, "sft.seed": seed} for overrides in best for seed in (1, 2)] == actual[5:]


def test_requested_trials_run_and_stopped_ones_do_not(tmp_path: Path) -> None:
    harness = QueueHarness(tmp_path, search(trials=2))
    first, second = harness.next(), harness.next()
    assert harness.next()[0] is None, "two concurrent trials"
    harness.end(*first)
    harness.control.add_trial({"sft.learning_rate": 0.5}, "cloned", first[0]["trial"])
    harness.control.add_trial({"sft.learning_rate": 0.6})
    requested = harness.next()
    assert (requested[0]["overrides"], requested[0]["origin"]) == ({"sft.learning_rate": 0.5}, "cloned")
    pending = harness.journal.open_trials[-1]
    assert pending.overrides == {"sft.learning_rate": 0.6}
    harness.control.request_stop(pending.trial)
    harness.queue._running.clear()
    assert harness.next()[0] == "FINISHED"
    assert harness.journal.records[pending.trial].outcome["state"] == "stopped"  # type: ignore[index]
    assert second[0]["trial"] != first[0]["trial"]


def test_outdated_request_fails_and_the_search_continues(tmp_path: Path) -> None:
    result: list[TrialStart] = []
    harness = QueueHarness(tmp_path, search(trials=1))
    harness.queue = Queue(
        harness.search,
        harness.journal,
        suggester(harness.search, 3, tmp_path, []),
        harness.control,
        max_concurrent=2,
        with_seed=lambda overrides, seed: overrides,
        on_untracked_end=result.append,
        invalid_reason=lambda overrides: "there is no `gone`" if "sft.gone" in overrides else "",
    )
    harness.control.add_trial({"sft.gone": 1})
    harness.end(*harness.next())
    assert harness.next()[0] == "FINISHED"
    assert [started.overrides for started in result] == [{"sft.gone": 1}]
    ended = harness.journal.records[result[0].trial].outcome
    assert ended is not None
    assert (ended["state"], ended["error"]) == ("failed", "there is no `gone`")


def test_partial_journal_line_is_truncated(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    journal = Journal(path)
    journal.begin(TrialStart("a", 0, {"x": 1}, "sampled"))
    journal.report("a", {"loss": 1.0})
    with path.open("a") as file:
        file.write('{"event": "ended", "tri')
    reopened = Journal(path)
    assert [started.trial for started in reopened.open_trials] == ["a"]
    reopened.end("a", state="done", values={"loss": 0.5}, seconds=1.0, error="")
    assert Journal(path).records["a"].outcome == {"state": "done", "values": {"loss": 0.5}, "seconds": 1.0, "error": ""}
    assert Journal(path).records["a"].reports == [{"loss": 1.0}]
