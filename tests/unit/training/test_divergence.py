"""Detection of a diverged training: optimizer steps, skipped steps, weights."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tunery.errors import StageError
from tunery.training.divergence import MAX_SKIPPED_STEPS, DivergenceGuard, check_finite, step_result
from tunery.training.packed.adamw import StepHyperparams, update
from tunery.training.training_stats import SKIPPED_STEPS, skipped_steps


def take(guard: DivergenceGuard, step: int, loss: float = 2.0, norm: float | None = 1.0, skipped: bool = False) -> bool:
    return guard.check_step(step, loss=loss, grad_norm=norm, learning_rate=1e-3, skipped=skipped)


def test_a_step_that_was_taken_with_a_value_that_is_not_finite_ends_the_training_at_once() -> None:
    guard = DivergenceGuard("sft")
    assert not take(guard, 1)
    assert not take(guard, 2, norm=None)  # DeepSpeed computes none under ZeRO-0 in fp32
    with pytest.raises(StageError, match=r"at step 3: loss nan, gradient norm 1 \(learning rate 0.001\)") as told:
        take(guard, 3, loss=math.nan)
    assert "lower `learning_rate`" in told.value.remedy
    with pytest.raises(StageError, match="gradient norm inf"):
        take(guard, 3, norm=math.inf)


def test_a_few_skipped_steps_are_counted_and_one_more_in_a_row_ends_the_training() -> None:
    guard = DivergenceGuard("sft")
    for step in range(1, MAX_SKIPPED_STEPS + 1):
        assert take(guard, step, norm=math.inf, skipped=True)
    assert not take(guard, MAX_SKIPPED_STEPS + 1)
    assert guard.skipped_steps == MAX_SKIPPED_STEPS
    guard.check_end()
    for step in range(10, 10 + MAX_SKIPPED_STEPS):
        assert take(guard, step, loss=math.nan, norm=math.inf, skipped=True)
    with pytest.raises(StageError, match="diverged at step 10"):  # the first of them
        take(guard, 13, norm=math.inf, skipped=True)


def test_a_training_whose_last_step_was_skipped_is_no_result() -> None:
    guard = DivergenceGuard("sft")
    take(guard, 8, norm=math.inf, skipped=True)
    assert guard.last_was_skipped
    with pytest.raises(StageError, match="diverged at step 8"):
        guard.check_end()


def test_a_resumed_training_goes_on_counting_skipped_steps() -> None:
    history = [{"step": 1.0, "loss": 2.0}, {"step": 2.0, SKIPPED_STEPS: 1.0}, {"step": 5.0, SKIPPED_STEPS: 2.0}]
    guard = DivergenceGuard("sft")
    guard.resume(history)
    take(guard, 6, norm=math.inf, skipped=True)
    assert guard.skipped_steps == skipped_steps(history) + 1 == 3


def test_trained_weights_that_are_not_finite_are_never_saved() -> None:
    model = torch.nn.Linear(2, 2)
    guard = DivergenceGuard("sft")
    take(guard, 4)
    guard.check_weights(4, model.named_parameters())
    with torch.no_grad():
        model.bias[1] = math.inf
    with pytest.raises(StageError, match=r"at step 4: `bias` has weights that are not finite \(learning rate 0.001\)"):
        guard.check_weights(4, model.named_parameters())
    model.bias.requires_grad_(False)
    guard.check_weights(4, model.named_parameters())


def test_a_measure_that_is_not_finite_is_named() -> None:
    check_finite("dpo", 3, eval_loss=1.0)
    with pytest.raises(StageError, match="diverged at step 3: eval margin nan"):
        check_finite("dpo", 3, eval_loss=1.0, eval_margin=math.nan)


@pytest.mark.parametrize(("norm", "applied", "result"), [(2.0, True, (2.0, False)), (None, True, (None, False))])
def test_what_an_engine_tells_of_a_step(norm: float | None, applied: bool, result: tuple[Any, bool]) -> None:
    engine = SimpleNamespace(get_global_grad_norm=lambda: norm, was_step_applied=lambda: applied)
    assert step_result(engine) == result


def test_a_member_of_a_pack_whose_gradients_are_not_finite_keeps_its_weights_and_moments() -> None:
    torch.manual_seed(0)
    state = [torch.rand(3, 5) for _ in range(4)]
    weights, grads, first, second = state
    rates = StepHyperparams(*(torch.full((3,), value, dtype=torch.float64) for value in (0.1, 0.01, 1.0, 2.0)))
    alone = [tensor[[0, 2]].clone() for tensor in state]
    pair = StepHyperparams(
        *(getattr(rates, name)[[0, 2]] for name in ("learning_rate", "weight_decay", "max_norm", "step"))
    )
    update(*alone, pair)
    before = [tensor[1].clone() for tensor in (weights, first, second)]
    grads[1, 3] = math.nan
    norms = update(*state, rates)
    assert not math.isfinite(norms[1])
    for tensor, kept in zip((weights, first, second), before, strict=True):
        assert torch.equal(tensor[1], kept)
    for tensor, other in zip((weights, first, second), (alone[0], alone[2], alone[3]), strict=True):
        assert torch.equal(tensor[[0, 2]], other)
