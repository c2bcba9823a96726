"""Forgetting relative to a baseline, and forgetting and win rates as metrics of a search."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from experiment_text import LoadText
from in_process import dataset, parsed, stage_context
from small_classifiers import WORDS, write_language_model

from tunery.evaluation.loss_eval import run_evaluate, with_forgetting
from tunery.search.space import metric_value, trial_experiment
from tunery.spec import Evaluate, Experiment, WinRate
from tunery.spec.check_search import metrics_of
from tunery.store.rows import row_id, write_rows

TEXT = """\
name: x
seed: 1
stages:
  docs: {kind: dataset, source: a.jsonl}
  prompts: {kind: dataset, source: b.jsonl}
  base: {kind: pretrain, data: docs, model: {scratch: tiny}, epochs: 2, learning_rate: 2e-3}
  sft: {kind: sft, data: prompts, model: base, epochs: 1, learning_rate: 1e-5}
  more: {kind: sft, data: prompts, model: sft, epochs: 1, learning_rate: 1e-5}
  eval: {kind: evaluate, models: [base, more, sft], data: {general: docs, domain: prompts}, baseline: base}
  wins: {kind: win_rate, models: [sft, more], baseline: base, judge: {python: reward.py}, data: prompts}
search:
  metric: eval.sft.general.loss
  mode: min
  trials: 3
  space:
    sft.learning_rate: {loguniform: [1e-5, 1e-3]}
"""


def result(model: str, name: str, loss: float) -> dict[str, Any]:
    return {"model": model, "set": name, "loss": loss}


def test_forgetting_is_the_relative_loss_increase_over_the_baseline() -> None:
    results = [result("base", "a", 2.0), result("base", "b", 4.0), result("sft", "a", 2.5), result("sft", "b", 3.0)]
    assert [entry["forgetting"] for entry in with_forgetting(results, "base")] == [0, 0, 0.25, -0.25]


def test_forgetting_is_nan_without_a_baseline_loss() -> None:
    results = with_forgetting([result("base", "a", math.nan), result("sft", "a", 2.0)], "base")
    assert all(math.isnan(entry["forgetting"]) for entry in results)
    results = with_forgetting([result("base", "a", 0.0), result("sft", "a", 2.0)], "base")
    assert all(math.isnan(entry["forgetting"]) for entry in results)


@pytest.mark.parametrize("baseline", [None, {"pretrained": "./base"}])
def test_results_have_forgetting_if_there_is_a_baseline(baseline: dict[str, str] | None, tmp_path: Path) -> None:
    write_language_model(tmp_path / "base")
    write_language_model(tmp_path / "sft", seed=1)
    rows = [{"text": " ".join(WORDS[n : n + 6]), "line": n} for n in range(9)]
    write_rows([{**row, "id": row_id(row)} for row in rows], tmp_path / "data")
    models = [{"pretrained": f"./{name}"} for name in ("base", "sft")]
    spec = {"kind": "evaluate", "models": models, "data": {"set": "data"}, "baseline": baseline}
    context = stage_context(parsed(Evaluate, spec), {"data": dataset(tmp_path / "data")}, tmp_path)
    base, tuned = run_evaluate(context).facts["results"]
    if baseline is None:
        assert "forgetting" not in base | tuned
    else:
        assert (base["forgetting"], tuned["forgetting"]) == (0, tuned["loss"] / base["loss"] - 1)


def experiment_with_metric(load_text: LoadText, metric: str) -> Experiment:
    return load_text(TEXT.replace("eval.sft.general.loss", metric))[0]


def test_search_metrics_can_be_forgetting_and_win_rates(load_text: LoadText) -> None:
    metrics = metrics_of(load_text(TEXT)[0])
    assert [name for name in metrics if name.endswith("forgetting")] == [
        f"eval.{model}.{name}.forgetting" for model in ("more", "sft") for name in ("general", "domain")
    ]
    assert [name for name in metrics if name.startswith("wins.")] == [
        f"wins.{model}.prompts.{measure}" for model in ("sft", "more") for measure in ("win_rate", "reward")
    ]


@pytest.mark.parametrize(
    ("metric", "models", "baseline"), [("forgetting", ("base", "sft"), "base"), ("loss", ("sft",), None)]
)
def test_trial_evaluates_the_baseline_for_forgetting(
    metric: str, models: tuple[str, ...], baseline: str | None, load_text: LoadText
) -> None:
    experiment = experiment_with_metric(load_text, f"eval.sft.general.{metric}")
    trial = trial_experiment(experiment, {"sft.learning_rate": 1e-4})
    stage = trial.stages["eval"]
    assert isinstance(stage, Evaluate)
    assert (stage.models, stage.data, stage.baseline) == (models, {"general": "docs"}, baseline)
    assert "more" not in trial.stages


def test_trial_compares_one_model_with_the_baseline(load_text: LoadText) -> None:
    experiment = experiment_with_metric(load_text, "wins.sft.prompts.win_rate")
    trial = trial_experiment(experiment, {"sft.learning_rate": 1e-4})
    stage = trial.stages["wins"]
    assert isinstance(stage, WinRate)
    assert stage.evaluated_models == ("base", "sft")
    assert "more" not in trial.stages
    facts = {"results": [{"model": "sft", "set": "prompts", "win_rate": 0.625}]}
    assert metric_value(facts, "wins.sft.prompts.win_rate") == 0.625
