"""Trials as experiments with overrides; topological order and dependencies of stages."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from tunery.spec import Dataset, Evaluate, Experiment, Keep, Perplexity, Pretrain, Score, Scratch, Select, Sft, Stage
from tunery.spec.graph import find_cycle, inputs_of, order, with_upstream
from tunery.spec.overrides import PathError, with_overrides

EXPERIMENT = Experiment(
    name="x",
    seed=1,
    stages={
        "docs": Dataset(kind="dataset", source="a.jsonl"),
        "base": Pretrain(
            kind="pretrain", data="docs", model=Scratch(scratch="tiny"), epochs=1.0, learning_rate=1e-3, warmup=0.1
        ),
        "scored": Score(kind="score", data="docs", by=(Perplexity(perplexity="base"),)),
        "clean": Select(kind="select", data="scored", keep={"perplexity": Keep(keep_fraction=0.8)}),
        "sft": Sft(kind="sft", data="clean", model="base", epochs="auto", learning_rate=1e-4),
        "eval": Evaluate(kind="evaluate", models=("base", "sft"), data={"held": "docs"}),
    },
)


def value_at(experiment: Experiment, path: str) -> Any:
    node: Any = experiment.model_dump(mode="json")["stages"]
    for key in path.split("."):
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("sft.learning_rate", 1e-5),
        ("sft.epochs", 3),
        ("sft.epochs", "auto"),
        ("sft.seed", 5),
        ("sft.seed", None),
        ("sft.tuner", {"lora": {"rank": 4, "alpha": "auto", "dropout": 0.0, "target_modules": "auto"}}),
        ("clean.keep.perplexity.keep_fraction", 0.5),
        ("scored.by.0.perplexity", "sft"),
        ("eval.data.held", "clean"),
        ("eval.models.1", "docs"),
        ("docs.limit", 10),
    ],
)
def test_override_changes_one_field_only(path: str, value: object) -> None:
    trial = with_overrides(EXPERIMENT, {path: value})
    assert value_at(trial, path) == value
    assert with_overrides(trial, {path: value_at(EXPERIMENT, path)}) == EXPERIMENT


def test_several_overrides_are_applied() -> None:
    trial = with_overrides(EXPERIMENT, {"sft.epochs": 2, "base.warmup": 0.0})
    assert (value_at(trial, "sft.epochs"), value_at(trial, "base.warmup")) == (2, 0.0)


def test_overrides_do_not_change_the_original() -> None:
    before = EXPERIMENT.model_dump_json()
    assert with_overrides(EXPERIMENT, {}) == EXPERIMENT
    with_overrides(EXPERIMENT, {"sft.epochs": 2})
    assert EXPERIMENT.model_dump_json() == before


@pytest.mark.parametrize(
    ("path", "remedy"),
    [
        ("sft", "use <stage>.<field>"),
        ("sft.learningrate", "did you mean `learning_rate`?"),
        ("stf.epochs", "did you mean `sft`?"),
        ("sft.zzz", "`sft` has: kind, data, epochs"),
        ("eval.models.2", "`eval.models` has: no fields"),
        ("eval.models.-1", "`eval.models` has: no fields"),
        ("sft.epochs.x", "`sft.epochs` has: no fields"),
        ("clean.keep.perplexity.keep_fractio", "did you mean `keep_fraction`?"),
        ("", "use <stage>.<field>"),
        ("sft.", "`sft` has: kind, data"),
    ],
)
def test_unknown_path_is_an_error_with_the_nearest_field(path: str, remedy: str) -> None:
    with pytest.raises(PathError) as caught:
        with_overrides(EXPERIMENT, {path: 1})
    assert f"`{path}`" in str(caught.value)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    ("path", "value"),
    [("sft.epochs", -1), ("sft.epochs", "soon"), ("sft.max_length", 2.5), ("sft.learning_rate", float("inf"))],
)
def test_invalid_value_is_rejected(path: str, value: object) -> None:
    with pytest.raises(ValidationError):
        with_overrides(EXPERIMENT, {path: value})


# Graphs of evaluate stages, whose `data` may name any number of other stages.


def stage_reading(names: list[str]) -> Stage:
    return Evaluate(kind="evaluate", models=("m",), data={"m": "m"} | {name: name for name in names})


MODEL = {"m": Dataset(kind="dataset", source="a.jsonl")}


@st.composite
def graphs(draw: st.DrawFn) -> dict[str, Stage]:
    """Acyclic graphs in any file order."""
    size = draw(st.integers(1, 8))
    dependencies = {
        f"s{index}": [f"s{earlier}" for earlier in range(index) if draw(st.booleans())] for index in range(size)
    }
    names = draw(st.permutations(list(dependencies)))
    return MODEL | {name: stage_reading(dependencies[name]) for name in names}


@given(graphs())
def test_order_is_topological_and_complete(stages: dict[str, Stage]) -> None:
    names = order(stages)
    assert sorted(names) == sorted(stages)
    for name in names:
        for dependency in inputs_of(stages[name]):
            assert names.index(dependency) < names.index(name)


@given(graphs())
def test_topological_file_order_is_kept(stages: dict[str, Stage]) -> None:
    ordered = {name: stages[name] for name in order(stages)}
    assert order(ordered) == tuple(ordered)


@given(graphs(), st.data())
def test_with_upstream_is_the_smallest_complete_subset(stages: dict[str, Stage], data: st.DataObject) -> None:
    names = data.draw(st.sets(st.sampled_from(sorted(stages)), min_size=1))
    subset = with_upstream(stages, names)
    assert names <= subset.keys()
    assert list(subset) == [name for name in stages if name in subset]
    used = {name for stage in subset.values() for name in inputs_of(stage)}
    assert used <= subset.keys()
    assert subset.keys() - names <= used
    assert with_upstream(stages, subset) == subset


@given(graphs())
def test_acyclic_graph_has_no_cycle(stages: dict[str, Stage]) -> None:
    assert find_cycle(stages) is None


@given(graphs(), st.data())
def test_cycle_follows_references_to_its_start(stages: dict[str, Stage], data: st.DataObject) -> None:
    user = data.draw(st.sampled_from([name for name in stages if name != "m"]))
    used = data.draw(st.sampled_from(sorted(with_upstream(stages, [user]).keys() - {"m"})))
    cyclic = {**stages, used: stage_reading([*inputs_of(stages[used]), user])}
    cycle = find_cycle(cyclic)
    assert cycle is not None
    assert cycle[0] == cycle[-1]
    assert len(cycle) > 1
    for reader, read in itertools.pairwise(cycle):
        assert read in inputs_of(cyclic[reader])


def test_reference_to_an_unknown_stage_is_not_a_cycle() -> None:
    assert find_cycle({"a": stage_reading(["nowhere"])}) is None


def test_inputs_are_unique_and_in_the_order_of_the_fields() -> None:
    evaluation = Evaluate(kind="evaluate", models=("base", "sft"), data={"a": "docs", "b": "docs", "c": "more"})
    assert inputs_of(evaluation) == ("base", "sft", "docs", "more")
