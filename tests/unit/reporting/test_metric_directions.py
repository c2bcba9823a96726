"""Which values of a metric are better: reports, tables and summary lines read it from the registry of stage kinds."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from experiment_text import LoadText

from tunery.events.event_reducer import RunState, replay
from tunery.events.stage_summary import evaluate_summary, win_rate_summary
from tunery.reporting.evaluation_tables import loss_table, win_table
from tunery.reporting.report_sections import leaderboard
from tunery.reporting.responses import prompt_responses
from tunery.reporting.score_section import auc_tables
from tunery.spec import STAGE_KINDS
from tunery.spec.stage_kinds import Direction
from tunery.store import Artifact

EVALUATIONS = {kind: spec for kind, spec in STAGE_KINDS.items() if spec.config.output_type == "metrics"}
METRICS = [(kind, metric) for kind, spec in EVALUATIONS.items() for metric in spec.metrics]
LOWER, HIGHER = 1.0, 2.0
EXPERIMENT = """\
name: x
seed: 1
stages:
  rows: {kind: dataset, source: a.jsonl}
  low: {kind: sft, data: rows, model: {pretrained: ./base}, epochs: 1, learning_rate: 1e-5}
  high: {kind: sft, data: rows, model: {pretrained: ./base}, epochs: 2, learning_rate: 1e-5}
  eval: {kind: evaluate, models: [low, high], data: {held: rows}}
  wins: {kind: win_rate, models: [low, high], baseline: {pretrained: ./base}, judge: {python: r.py}, data: rows}
"""


def flip(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Reverse the direction of all metrics of a kind."""

    def flipped(metrics: Any) -> dict[str, Direction]:
        return {metric: "minimize" if way == "maximize" else "maximize" for metric, way in metrics.items()}

    spec = STAGE_KINDS[kind]
    reversed_spec = dataclasses.replace(spec, metrics=flipped(spec.metrics), other_metrics=flipped(spec.other_metrics))
    monkeypatch.setitem(STAGE_KINDS._entries, kind, reversed_spec)


def evaluated(kind: str, metric: str) -> RunState:
    """A run whose models `low` and `high` have the values 1 and 2 of a metric."""
    results = [{"model": name, "set": "held", metric: value} for name, value in (("low", LOWER), ("high", HIGHER))]
    finished = {"t": 1.0, "event": "stage_finished", "stage": "s", "kind": kind, "facts": {"results": results}}
    return replay([finished])


def marked(state: RunState) -> list[str]:
    """The models whose value is marked as the best."""
    table = leaderboard(state)
    assert table is not None
    return [row[0].text for row in table.rows if row[1].best]


@pytest.mark.parametrize(("kind", "metric"), METRICS)
def test_leaderboard_marks_the_best_value_by_the_registered_direction(
    kind: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = "low" if EVALUATIONS[kind].metrics[metric] == "minimize" else "high"
    assert marked(evaluated(kind, metric)) == [expected]
    flip(monkeypatch, kind)
    assert marked(evaluated(kind, metric)) == [{"low": "high", "high": "low"}[expected]]


@pytest.mark.parametrize(
    ("kind", "metric"), [("evaluate", "accuracy"), ("evaluate", "win_rate"), ("win_rate", "loss"), ("plugin", "loss")]
)
def test_leaderboard_marks_nothing_without_a_registered_direction(kind: str, metric: str) -> None:
    assert marked(evaluated(kind, metric)) == []


def test_auc_tables_mark_the_best_score_by_the_registered_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = {"low": {"auc": LOWER}, "high": {"auc": HIGHER}}
    event = {"t": 1.0, "event": "stage_finished", "stage": "s", "kind": "score", "facts": {"scores": scores}}

    def best_scores() -> list[str]:
        ((_, table),) = auc_tables(replay([event]))
        return [row[0].text for row in table.rows if row[1].best]

    assert best_scores() == ["high"]
    flip(monkeypatch, "score")
    assert best_scores() == ["low"]


def test_responses_mark_the_best_reward_by_the_registered_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {name: {"response": name, "reward": value} for name, value in (("low", LOWER), ("high", HIGHER))}
    facts = {"responses": [{"prompt": "p", "responses": models}]}

    def best_models() -> list[str]:
        (prompt,) = prompt_responses(facts)
        return [response.label for response in prompt.responses if response.best]

    assert best_models() == ["high"]
    flip(monkeypatch, "win_rate")
    assert best_models() == ["low"]


def losses() -> dict[str, Any]:
    values = (("low", LOWER), ("high", HIGHER))
    return {"results": [{"model": name, "set": "held", "loss": loss, "perplexity": 1.0} for name, loss in values]}


def wins() -> dict[str, Any]:
    same = {
        "set": "held",
        "interval": [0.0, 1.0],
        "reward": 0.0,
        "rows": 9,
        "response_length": 1.0,
        "baseline": {"model": "base", "reward": 0.0},
        "left_out": {"too_long": 0, "unusable": 0},
    }
    return {"results": [{**same, "model": name, "win_rate": rate} for name, rate in (("low", 0.25), ("high", 0.75))]}


def test_summary_lines_name_the_best_model_by_the_registered_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    assert evaluate_summary(losses()).startswith("best low")
    assert win_rate_summary(wins()).startswith("best high")
    flip(monkeypatch, "evaluate")
    flip(monkeypatch, "win_rate")
    assert evaluate_summary(losses()).startswith("best high")
    assert win_rate_summary(wins()).startswith("best low")


def test_summary_tables_are_sorted_by_the_registered_direction(
    load_text: LoadText, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, _ = load_text(EXPERIMENT)
    facts = {"low": {"steps": 1}, "high": {"steps": 1}, "eval": losses(), "wins": wins()}
    artifacts = {name: Artifact(Path(name), {"facts": value}, {}) for name, value in facts.items()}

    def models() -> list[list[str]]:
        tables = [loss_table(experiment, artifacts, {}), win_table(experiment, artifacts, {})]
        return [[row[0] for row in table["rows"]] for table in tables if table is not None]

    assert models() == [["low", "high"], ["high", "low"]]
    flip(monkeypatch, "evaluate")
    flip(monkeypatch, "win_rate")
    assert models() == [["high", "low"], ["low", "high"]]
