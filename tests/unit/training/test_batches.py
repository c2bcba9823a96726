"""Number of steps, batch sizes and data order; resolved `auto` values; DeepSpeed's configuration and memory."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.errors import RequestError
from tunery.spec import Compute, Lora, Pretrain, Pretrained, Scratch, Sft, Training
from tunery.spec.tuners import LoraTuner
from tunery.training.auto import GLOBAL_BATCH_SIZES, resolve_auto
from tunery.training.batches import MAX_AUTO_MICRO_BATCH, data_order, evenly_spaced_steps, plan_batches
from tunery.training.deepspeed_config import deepspeed_config, model_state_bytes

LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


# Batches.


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8))
def test_global_batch_is_workers_times_micro_batch_times_accumulation(
    workers: int, micro: int, accumulation: int
) -> None:
    size = workers * micro * accumulation
    explicit = plan_batches(100, 1, size, workers, micro)
    assert (explicit.micro_batch_size, explicit.gradient_accumulation_steps) == (micro, accumulation)
    automatic = plan_batches(100, 1, size, workers, None)
    assert (
        automatic.workers * automatic.micro_batch_size * automatic.gradient_accumulation_steps
        == size
        == automatic.global_batch_size
    )


@given(st.integers(1, 8), st.integers(1, 64))
def test_micro_batch_is_the_largest_that_divides_a_workers_share(workers: int, share: int) -> None:
    micro = plan_batches(1, 1, workers * share, workers, None).micro_batch_size
    assert share % micro == 0
    assert micro <= MAX_AUTO_MICRO_BATCH
    assert not [size for size in range(micro + 1, MAX_AUTO_MICRO_BATCH + 1) if share % size == 0]


@pytest.mark.parametrize(
    ("rows", "epochs", "size", "steps"),
    [
        (100, 1, 10, 10),
        (101, 1, 10, 11),
        (100, 3, 8, 38),
        (100, 0.5, 10, 5),
        (1, 1, 64, 1),
        (10, 0.01, 8, 1),
        (30, 0.1, 1, 3),  # 30 * 0.1 is a little more than 3 in floating point
        (1000, 2, 1000, 2),
    ],
)
def test_steps_cover_the_rows_for_the_requested_epochs(rows: int, epochs: float, size: int, steps: int) -> None:
    assert plan_batches(rows, epochs, size, 1, None).steps == steps


def test_number_of_steps_does_not_depend_on_workers_and_micro_batches() -> None:
    assert {plan_batches(100, 2, 24, workers, micro).steps for workers in (1, 2, 3, 4) for micro in (None, 1, 2)} == {9}


def test_global_batch_that_cannot_be_split_over_the_workers_is_rejected() -> None:
    with pytest.raises(RequestError) as caught:
        plan_batches(100, 1, 8, 3, None)
    assert caught.value.message == "global_batch_size 8 can't be split over 3 workers"
    assert "a multiple of 3, or fewer workers" in caught.value.remedy


def test_micro_batch_that_does_not_divide_a_workers_share_is_rejected() -> None:
    with pytest.raises(RequestError) as caught:
        plan_batches(100, 1, 16, 2, 3)
    assert caught.value.message == "micro_batch_size 3 does not divide a worker's share of 8 sequences per step"
    assert caught.value.cause == "global_batch_size 16 over 2 workers"
    assert "micro_batch_size: auto" in caught.value.remedy


# Data order.


@given(LENGTHS, st.integers(1, 4), st.integers(0, 9))
def test_each_epoch_covers_every_row_exactly_once(lengths: list[int], epochs: int, seed: int) -> None:
    rows = len(lengths)
    for size in [size for size in range(1, rows + 1) if rows % size == 0]:
        order = data_order(lengths, epochs * rows // size, size, seed)
        for epoch in range(epochs):
            assert sorted(order[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(LENGTHS, st.integers(1, 12), st.integers(1, 16), st.integers(0, 9))
def test_rows_occur_equally_often_up_to_the_last_epoch(lengths: list[int], steps: int, size: int, seed: int) -> None:
    order = data_order(lengths, steps, size, seed)
    assert len(order) == steps * size
    counts = Counter(order)
    occurrences = [counts[row] for row in range(len(lengths))]
    assert max(occurrences) - min(occurrences) <= 1


@given(LENGTHS, st.integers(1, 6), st.integers(1, 16))
def test_longest_rows_of_a_step_come_first(lengths: list[int], steps: int, size: int) -> None:
    order = data_order(lengths, steps, size, 0)
    for step in range(steps):
        step_lengths = [lengths[row] for row in order[step * size : (step + 1) * size]]
        assert step_lengths == sorted(step_lengths, reverse=True)


@given(LENGTHS, st.integers(1, 4), st.integers(0, 9))
def test_rows_of_a_step_do_not_depend_on_how_many_steps_follow(lengths: list[int], size: int, seed: int) -> None:
    eight_steps = data_order(lengths, 8, size, seed)
    assert data_order(lengths, 3, size, seed).tolist() == eight_steps[: 3 * size].tolist()


def test_order_depends_on_the_seed_and_differs_between_epochs() -> None:
    lengths = [(n * 7) % 13 for n in range(50)]
    assert data_order(lengths, 10, 5, 1).tolist() == data_order(lengths, 10, 5, 1).tolist()
    assert data_order(lengths, 10, 5, 1).tolist() != data_order(lengths, 10, 5, 2).tolist()
    first, second = (data_order(lengths, 20, 5, 1)[start : start + 50].tolist() for start in (0, 50))
    assert first != second, "each epoch is shuffled differently"


# Evaluations.


@given(st.integers(1, 500), st.integers(1, 30))
def test_evenly_spaced_steps_have_the_requested_count_and_include_the_last(steps: int, count: int) -> None:
    spaced = evenly_spaced_steps(steps, count)
    assert spaced[-1] == steps
    assert len(spaced) == min(steps, count)
    assert spaced == sorted(set(spaced))
    assert spaced[0] >= 1
    gaps = [after - before for before, after in zip([0, *spaced], spaced, strict=False)]
    assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("steps", "count", "expected"), [(100, 4, [25, 50, 75, 100]), (10, 3, [4, 7, 10]), (2, 5, [1, 2]), (7, 1, [7])]
)
def test_evenly_spaced_steps_by_hand(steps: int, count: int, expected: list[int]) -> None:
    assert evenly_spaced_steps(steps, count) == expected


# auto


def pretrain(model: Any, **fields: Any) -> Pretrain:
    return Pretrain(kind="pretrain", data="d", model=model, **({"epochs": "auto", "learning_rate": "auto"} | fields))


def sft(**fields: Any) -> Sft:
    return Sft(kind="sft", data="d", model="base", **({"epochs": "auto", "learning_rate": "auto"} | fields))


TINY = Scratch(scratch="tiny")


@pytest.mark.parametrize(
    ("stage", "rows", "epochs", "learning_rate", "size"),
    [
        (pretrain(TINY), 999, 4.0, 2e-3, 8),
        (pretrain(TINY), 1_000, 4.0, 2e-3, 16),
        (pretrain(Pretrained(pretrained="org/name")), 99_999, 4.0, 2e-5, 64),
        (pretrain("base"), 100_000, 1.0, 2e-5, 128),
        (sft(), 1, 3.0, 2e-5, 8),
        (sft(), 9_999, 3.0, 2e-5, 16),
        (sft(), 10_000, 2.0, 2e-5, 64),
        (sft(tuner=LoraTuner(lora=Lora())), 100_000, 1.0, 2e-4, 128),
    ],
)
def test_auto_is_resolved_by_the_documented_rules(
    stage: Training, rows: int, epochs: float, learning_rate: float, size: int
) -> None:
    resolved, fields = resolve_auto(stage, rows)
    assert (resolved.epochs, resolved.learning_rate, resolved.global_batch_size) == (epochs, learning_rate, size)
    assert [(item.field, item.value) for item in fields] == [
        ("epochs", epochs),
        ("learning_rate", learning_rate),
        ("global_batch_size", size),
    ]
    assert all(item.rule for item in fields)
    assert resolved.global_batch_size in GLOBAL_BATCH_SIZES


def test_explicit_values_are_kept_and_not_listed_as_resolved() -> None:
    stage = sft(epochs=7.0, learning_rate=0.5, global_batch_size=3)
    assert resolve_auto(stage, 10) == (stage, [])
    resolved, fields = resolve_auto(sft(epochs=7.0), 10)
    assert resolved.epochs == 7.0
    assert [item.field for item in fields] == ["learning_rate", "global_batch_size"]


@pytest.mark.parametrize("stage", [pretrain(TINY), sft()], ids=["pretrain", "sft"])
def test_no_auto_is_left_in_any_field(stage: Training) -> None:
    resolved, _ = resolve_auto(stage, 500)
    left = {field for field in type(resolved).model_fields if getattr(resolved, field) == "auto"}
    assert left == set()


# DeepSpeed


@pytest.mark.parametrize("zero_stage", get_args(Compute.model_fields["zero_stage"].annotation))
def test_configuration_is_json_and_leaves_batch_sizes_to_transformers(zero_stage: int) -> None:
    config = deepspeed_config(zero_stage)
    assert json.loads(json.dumps(config)) == config
    zero = config["zero_optimization"]
    assert zero["stage"] == zero_stage
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero_stage == 3)
    assert {config[key] for key in config if key.startswith(("train_", "gradient_"))} == {"auto"}


BILLION = 10**9


@pytest.mark.parametrize(
    ("zero_stage", "workers", "bf16", "gigabytes"),
    [
        # Full fine-tuning of 1 B parameters: bf16 2 + 2 + 12 bytes per parameter, fp32 4 + 4 + 8.
        (0, 4, True, 16),
        (1, 4, True, 2 + 2 + 3),
        (2, 4, True, 2 + 0.5 + 3),
        (3, 4, True, 0.5 + 0.5 + 3),
        (3, 1, True, 16),
        (0, 8, False, 16),
        (1, 8, False, 4 + 4 + 1),
        (2, 8, False, 4 + 0.5 + 1),
        (3, 8, False, 0.5 + 0.5 + 1),
    ],
)
def test_memory_of_full_fine_tuning_by_hand(zero_stage: int, workers: int, bf16: bool, gigabytes: float) -> None:
    assert model_state_bytes(BILLION, BILLION, zero_stage, workers, bf16) == gigabytes * BILLION


def test_memory_of_lora_is_the_frozen_weights_and_the_state_of_the_trained_ones() -> None:
    # 1 B frozen in bf16 are 2 GB; 10 M trained ones take 14 bytes each for gradients and AdamW.
    assert model_state_bytes(BILLION, 10**7, 0, 1, True) == 2 * BILLION + 14 * 10**7
    assert model_state_bytes(BILLION, 10**7, 3, 4, True) == math.floor((2 * BILLION + 14 * 10**7) / 4)


@given(st.integers(1, 10**9), st.integers(1, 64), st.booleans())
def test_higher_zero_stage_never_needs_more_memory(parameters: int, workers: int, bf16: bool) -> None:
    bytes_by_stage = [model_state_bytes(parameters, parameters, stage, workers, bf16) for stage in range(4)]
    assert bytes_by_stage == sorted(bytes_by_stage, reverse=True)
