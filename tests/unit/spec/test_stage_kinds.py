"""The registry of stage kinds: its entries are complete and refer to what exists."""

from __future__ import annotations

from dataclasses import fields

import pytest

from tunery.models.encode_rows import RowEncoding
from tunery.spec import STAGE_KINDS, TRAINERS
from tunery.spec.plugins import load_object
from tunery.spec.stage_kinds import StageKind, TrainerSpec

REFERENCES = [
    (kind, field.name)
    for kind, spec in STAGE_KINDS.items()
    for field in fields(spec)
    if ":" in str(getattr(spec, field.name)) and isinstance(getattr(spec, field.name), str)
]


def test_kinds_are_in_the_order_of_the_documentation() -> None:
    rows, evaluations = ["dataset", "score", "select", "review", "augment"], ["evaluate", "win_rate"]
    trainers = ["pretrain", "sft", "classifier", "reward", "dpo", "kto", "grpo", "rloo", "ppo"]
    assert list(STAGE_KINDS) == [*rows, *trainers, *evaluations]
    assert list(TRAINERS) == trainers


def test_kind_that_does_not_train_is_no_trainer() -> None:
    assert "evaluate" not in TRAINERS
    assert TRAINERS.get("evaluate") is None


@pytest.mark.parametrize(("kind", "field"), REFERENCES)
def test_reference_of_an_entry_exists(kind: str, field: str) -> None:
    found = load_object(getattr(STAGE_KINDS[kind], field))
    assert isinstance(found, RowEncoding) if field == "row_encoding" else callable(found)


@pytest.mark.parametrize("spec", TRAINERS.values(), ids=list(TRAINERS))
def test_trainer_says_how_it_trains_its_rows(spec: TrainerSpec) -> None:
    assert spec.row_encoding
    assert spec.metrics
    assert bool(spec.trainer) == (spec.loop == TrainerSpec.loop), "the default loop needs a trainer, others have none"
    assert bool(spec.labels) == (spec.model_form == "classifier")


@pytest.mark.parametrize("spec", STAGE_KINDS.values(), ids=list(STAGE_KINDS))
def test_stage_without_a_model_as_output_names_its_metrics_if_it_measures(spec: StageKind) -> None:
    if not isinstance(spec, TrainerSpec):
        assert bool(spec.metrics) == (spec.config.output_type == "metrics")
