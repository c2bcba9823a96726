"""The experiments in experiments/ cover every stage kind and scheduler; `make experiments` reports their results."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from sample_search import searched_events

from tunery.events.event_reducer import replay
from tunery.events.run_state import RunState
from tunery.reporting import evaluation_tables, filter_tables, summary_tables, training_tables
from tunery.spec import Search, load
from tunery.spec.stage_kinds import STAGE_KINDS

FOLDER = Path(__file__).parents[2] / "experiments"
FILES = sorted(FOLDER.glob("*.yaml"))
EXPERIMENTS = {path.stem: load(path)[0] for path in FILES}


def load_module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


run_all, rewards = load_module("run_all"), load_module("rewards")


@pytest.mark.parametrize("kind", STAGE_KINDS)
def test_every_stage_kind_has_an_experiment(kind: str) -> None:
    assert [name for name, item in EXPERIMENTS.items() if any(stage.kind == kind for stage in item.stages.values())]


@pytest.mark.parametrize("scheduler", get_args(Search.model_fields["scheduler"].annotation))
def test_every_search_scheduler_has_an_experiment(scheduler: str) -> None:
    assert [name for name, item in EXPERIMENTS.items() if item.search and item.search.scheduler == scheduler]


def test_run_has_the_name_of_its_file() -> None:
    assert [item.name for item in EXPERIMENTS.values()] == list(EXPERIMENTS)


def test_every_reported_column_is_in_a_summary_table() -> None:
    modules = (evaluation_tables, filter_tables, summary_tables, training_tables)
    source = "".join(Path(module.__file__).read_text(encoding="utf-8") for module in modules)
    names = [
        *run_all.FIGURES,
        run_all.SEARCH_TABLE,
        *(column for columns in run_all.FIGURES.values() for column in columns),
    ]
    assert [name for name in names if f'"{name}"' not in source] == []


def state_of(*events: dict[str, Any]) -> RunState:
    return replay([{"t": float(number), **event} for number, event in enumerate(events)])


def test_figures_are_the_chosen_columns_of_each_table() -> None:
    table = {
        "event": "comparison",
        "title": "Win rates",
        "columns": ["model", "baseline", "win rate", "95% interval"],
        "rows": [["dpo", "sft", 0.642, "0.560–0.710"], ["kto", "sft", 0.5, "0.420–0.580"]],
        "notes": [],
    }
    assert run_all.figures(state_of(table)) == ["win rate, 95% interval: dpo 0.642 0.560–0.710, kto 0.500 0.420–0.580"]


def test_figures_of_a_search_are_its_result_and_the_steps_of_its_trials() -> None:
    result = {"event": "comparison", "title": run_all.SEARCH_TABLE, "columns": [], "rows": [], "notes": ["best: t00"]}
    *notes, steps = run_all.figures(replay([*searched_events(trials=3), {"t": 1e10, **result}]))
    assert notes == ["best: t00"]
    assert re.fullmatch(r"steps of all trials: [1-9][\d,]*", steps)


def failed_at(kind: str) -> RunState:
    started = {"event": "run_started", "stages": [{"name": "checked", "kind": kind, "inputs": []}]}
    return state_of(
        started, {"event": "stage_failed", "stage": "checked", "kind": kind, "message": "no row is decided"}
    )


def test_missing_review_decisions_are_not_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "review.yaml"
    file.write_text((FOLDER / "review.yaml").read_text(encoding="utf-8"), encoding="utf-8")
    assert run_all.awaits_review(file, failed_at("review"))
    (tmp_path / "decisions").mkdir()
    (tmp_path / "decisions" / "checked.jsonl").touch()
    assert not run_all.awaits_review(file, failed_at("review"))
    assert not run_all.awaits_review(file, failed_at("select"))
    assert not run_all.awaits_review(file, state_of())


def test_rewards_have_the_values_of_their_description() -> None:
    assert rewards.count_the(["", ""], ["The cat, the dog; then", "the " * 9]) == [2.0, 5.0]
    assert rewards.is_uncorrupted([""] * 4, ["It returns a new list.", "It returns a", "a b c a b c .", ""]) == [
        2,
        1,
        1.8,
        0,
    ]
