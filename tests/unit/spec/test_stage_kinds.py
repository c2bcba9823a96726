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


def test_kinds_without_training_are_not_trainers() -> None:
    assert "evaluate" not in TRAINERS
    assert TRAINERS.get("evaluate") is None


@pytest.mark.parametrize(("kind", "field"), REFERENCES)
def test_reference_of_an_entry_exists(kind: str, field: str) -> None:
    item = load_object(getattr(STAGE_KINDS[kind], field))
    assert isinstance(item, RowEncoding) if field == "row_encoding" else callable(item)


@pytest.mark.parametrize("spec", TRAINERS.values(), ids=list(TRAINERS))
def test_trainer_declares_row_encoding_metrics_and_loop(spec: TrainerSpec) -> None:
    assert spec.row_encoding
    assert spec.metrics
    assert bool(spec.trainer) == (spec.loop == TrainerSpec.loop), "the default loop needs a trainer, others have none"
    assert bool(spec.labels) == (spec.model_form == "classifier")


@pytest.mark.parametrize("spec", STAGE_KINDS.values(), ids=list(STAGE_KINDS))
def test_evaluations_declare_their_metrics(spec: StageKind) -> None:
    if not isinstance(spec, TrainerSpec):
        assert bool(spec.metrics) == (spec.config.output_type == "metrics")
