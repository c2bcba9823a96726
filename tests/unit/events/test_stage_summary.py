"""Unusable and truncated rows of a training are in its summary line, the report's funnel and W&B's funnel."""

from __future__ import annotations

from typing import Any

import pytest

from tunery.events.run_state import StageState
from tunery.events.stage_summary import note
from tunery.reporting.funnel_section import funnel_levels

DPO = {"rows": 60, "sequences": 28, "truncated": 27, "unusable": 32, "loss": 0.5, "eval_loss": 0.625}


def stage(name: str, kind: str, inputs: list[str], **facts: Any) -> StageState:
    return StageState(name, kind, inputs=inputs, status="done", facts=facts)


def test_training_note_has_the_number_of_used_rows() -> None:
    assert note(stage("a", "dpo", [], **DPO)) == "loss 0.500 → eval 0.625, 28 of 60 rows (32 unusable, 27 truncated)"


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"rows": 1_200, "unusable": 0, "truncated": 0}, "loss 0.500"),
        ({"rows": 1_200, "unusable": 0, "truncated": 12}, "loss 0.500, 1,200 rows (12 truncated)"),
        ({"rows": 60, "unusable": 1, "too_long": 9}, "loss 0.500, 50 of 60 rows (1 unusable, 9 too long)"),
        ({}, "loss 0.500"),
    ],
)
def test_training_note_lists_only_occurring_reasons(facts: dict[str, Any], expected: str) -> None:
    assert note(stage("a", "grpo", [], loss=0.5, **facts)) == expected


def levels(*stages: StageState) -> list[tuple[str, float, str]]:
    return [(level.label, level.rows, level.note) for level in funnel_levels(stages, stages[0])]


def test_funnel_ends_with_the_rows_that_a_training_used() -> None:
    pairs = stage("pairs", "dataset", [], rows=60)
    assert levels(pairs, stage("policy", "dpo", ["pairs", "base"], **DPO)) == [
        ("read", 60, ""),
        ("used by policy", 28, "−32 (53%), 32 unusable, 27 truncated"),
    ]


def test_funnel_of_a_training_continues_after_its_filter() -> None:
    pairs, clean = stage("pairs", "dataset", [], rows=80), stage("clean", "select", ["pairs"], rows_in=80, kept=60)
    assert levels(pairs, clean, stage("policy", "dpo", ["clean", "base"], **DPO))[1:] == [
        ("kept by clean", 60, "−20 (25%)"),
        ("used by policy", 28, "−32 (53%), 32 unusable, 27 truncated"),
    ]


def test_funnel_omits_trainings_that_use_all_rows_or_only_evaluate_on_them() -> None:
    validation = stage("validation", "dataset", [], rows=60)
    assert len(levels(validation, stage("policy", "dpo", ["pairs", "validation"], **DPO))) == 1
    all_used = {**DPO, "unusable": 0, "truncated": 0}
    assert len(levels(validation, stage("policy", "dpo", ["validation"], **all_used))) == 1


def test_funnels_of_the_sources_of_a_mixture_end_with_their_own_used_rows() -> None:
    web, code = stage("web", "dataset", [], rows=100), stage("code", "dataset", [], rows=50)
    mixture = {
        "web": {"rows": 100, "unusable": 4, "truncated": 0, "share": 0.5},
        "code": {"rows": 50, "unusable": 0, "truncated": 0, "share": 0.5},
    }
    mixed = stage("mixed", "sft", ["web", "code", "base"], rows=150, unusable=4, mixture=mixture)
    assert levels(web, code, mixed)[1:] == [("used by mixed", 96, "−4 (4%), 4 unusable")]
    assert levels(code, web, mixed)[1:] == []
