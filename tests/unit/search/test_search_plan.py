"""The plan of a search: shared stages, packed trials, and equivalent trials."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from experiment_text import LoadText

from tunery.pipeline.compute import Hardware, resolve_compute
from tunery.search.search_plan import plan_search
from tunery.spec import Experiment
from tunery.spec.yaml_source import read_yaml
from tunery.store import Store
from tunery.workers.cluster_resources import NodeResources

TEXT = """
name: x
seed: 17
stages:
  docs: {kind: dataset, source: "builtin:python-docs", subset: texts, split: train, limit: 10}
  base: {kind: pretrain, data: docs, model: {scratch: tiny}, epochs: 1, learning_rate: 1e-3}
  rows: {kind: dataset, source: "builtin:python-docs", subset: questions, split: train, limit: 10}
  held: {kind: dataset, source: "builtin:python-docs", subset: questions, split: test, limit: 10}
  scored: {kind: score, data: rows, by: [{length: words}]}
  clean: {kind: select, data: scored, keep: {length: {keep_fraction: 0.5}}}
  sft:  {kind: sft, data: clean, model: base, epochs: 1, learning_rate: 1e-3, eval_data: held}
search:
  metric: sft.eval_loss
  mode: min
  trials: 30
  algorithm: grid
  space:
    clean.keep.length.keep_fraction: {choice: [0.5, 0.8]}
    sft.tuner: {choice: [full, {lora: {rank: 8}}, {lora: {rank: 8, dropout: 0.1}}]}
    sft.epochs: {choice: [1, 1.0, 2]}
"""


def plan_of(text: str, load_text: LoadText, tmp_path: Path, hardware: Hardware | None = None) -> Any:
    experiment, _ = load_text(text)
    compute, _ = resolve_compute(experiment.compute, hardware or Hardware([NodeResources(2)], "here"))
    resolved: Experiment = experiment.model_copy(update={"compute": compute})
    return plan_search(resolved, Store(tmp_path / "store"), tmp_path, 2, "2 CPUs / 1 a trial")


def test_plan_lists_shared_stages_differing_stages_and_packs(load_text: LoadText, tmp_path: Path) -> None:
    plan = plan_of(TEXT, load_text, tmp_path)
    assert plan.shared == ["docs", "base", "rows", "held", "scored"]
    assert plan.per_trial == {"clean": 2, "sft": 2 * 3 * 2}
    assert (plan.packed, plan.pack_size, plan.max_concurrent) == (6, 4, 8)
    assert {reason: count for reason, count in plan.unpacked.items() if count} == {
        "sft: full fine-tuning changes the base that a pack shares": 6,
        "sft: LoRA's dropout would be drawn for all members together": 6,
    }
    assert len(plan.duplicates) == 6, "epochs 1 and 1.0 are equal"
    assert any("unknown" in line for line in plan.lines())


UNPACKED: dict[str, tuple[str, str, str]] = {
    "switched off": ("search:", "compute: {max_packed_trials: 1}\nsearch:", "sft: compute.max_packed_trials is 1"),
    "several workers": ("search:", "compute: {workers_per_trial: 2}\nsearch:", "a trial has 2 workers"),
    "different base models": ("sft.epochs", "base.epochs", "base: a pretrain stage has no packed form, sft has"),
}


@pytest.mark.parametrize(("old", "new", "reason"), UNPACKED.values(), ids=UNPACKED)
def test_plan_explains_unpacked_trials(old: str, new: str, reason: str, load_text: LoadText, tmp_path: Path) -> None:
    text = TEXT.replace("[full, {lora: {rank: 8}}, {lora: {rank: 8, dropout: 0.1}}]", "[{lora: {rank: 8}}]")
    assert plan_of(text, load_text, tmp_path).unpacked == {}
    actual = plan_of(text.replace(old, new, 1), load_text, tmp_path)
    assert list(actual.unpacked) == [reason]
    assert actual.packed == 0


def test_dimensions_of_the_documentation_are_valid(load_text: LoadText) -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/search.md").read_text()
    example = re.search(r"^space:\n(?:  .*\n)+", page, flags=re.M)
    assert example is not None
    space = read_yaml(example[0], "search.md").data["space"]
    text = TEXT[: TEXT.index("  space:")].replace("algorithm: grid", "algorithm: random")
    dimensions = {path.replace("perplexity", "length"): dimension for path, dimension in space.items()}
    experiment, _ = load_text(text + f"  space: {dimensions}\n".replace("'", '"'))
    assert experiment.search is not None
    assert set(experiment.search.space) == set(dimensions)


@pytest.mark.parametrize(("scheduler", "expected"), [("hyperband", True), ("asha", False)])
def test_algorithm_that_cannot_learn_is_noted(
    scheduler: str, expected: bool, load_text: LoadText, tmp_path: Path
) -> None:
    text = TEXT.replace("algorithm: grid", f"algorithm: tpe\n  scheduler: {scheduler}")
    lines = plan_of(text, load_text, tmp_path).lines()
    assert any("tpe cannot learn from results: hyperband starts all trials" in line for line in lines) == expected
