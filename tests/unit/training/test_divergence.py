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


def check(
    guard: DivergenceGuard, step: int, loss: float = 2.0, norm: float | None = 1.0, skipped: bool = False
) -> bool:
    return guard.check_step(step, loss=loss, grad_norm=norm, learning_rate=1e-3, skipped=skipped)


def test_non_finite_value_in_an_applied_step_ends_the_training() -> None:
    guard = DivergenceGuard("sft")
    assert not check(guard, 1)
    assert not check(guard, 2, norm=None)  # DeepSpeed computes none under ZeRO-0 in fp32
    with pytest.raises(StageError, match=r"at step 3: loss nan, gradient norm 1 \(learning rate 0.001\)") as caught:
        check(guard, 3, loss=math.nan)
    assert "lower `learning_rate`" in caught.value.remedy
    with pytest.raises(StageError, match="gradient norm inf"):
        check(guard, 3, norm=math.inf)


def test_too_many_consecutive_skipped_steps_end_the_training() -> None:
    guard = DivergenceGuard("sft")
    for step in range(1, MAX_SKIPPED_STEPS + 1):
        assert check(guard, step, norm=math.inf, skipped=True)
    assert not check(guard, MAX_SKIPPED_STEPS + 1)
    assert guard.skipped_steps == MAX_SKIPPED_STEPS
    guard.check_end()
    for step in range(10, 10 + MAX_SKIPPED_STEPS):
        assert check(guard, step, loss=math.nan, norm=math.inf, skipped=True)
    with pytest.raises(StageError, match="diverged at step 10"):  # the first of them
        check(guard, 13, norm=math.inf, skipped=True)


def test_training_that_ends_with_a_skipped_step_is_an_error() -> None:
    guard = DivergenceGuard("sft")
    check(guard, 8, norm=math.inf, skipped=True)
    assert guard.last_was_skipped
    with pytest.raises(StageError, match="diverged at step 8"):
        guard.check_end()


def test_resumed_training_continues_the_count_of_skipped_steps() -> None:
    history = [{"step": 1.0, "loss": 2.0}, {"step": 2.0, SKIPPED_STEPS: 1.0}, {"step": 5.0, SKIPPED_STEPS: 2.0}]
    guard = DivergenceGuard("sft")
    guard.resume(history)
    check(guard, 6, norm=math.inf, skipped=True)
    assert guard.skipped_steps == skipped_steps(history) + 1 == 3


def test_non_finite_trained_weights_are_an_error() -> None:
    model = torch.nn.Linear(2, 2)
    guard = DivergenceGuard("sft")
    check(guard, 4)
    guard.check_weights(4, model.named_parameters())
    with torch.no_grad():
        model.bias[1] = math.inf
    with pytest.raises(StageError, match=r"at step 4: `bias` has weights that are not finite \(learning rate 0.001\)"):
        guard.check_weights(4, model.named_parameters())
    model.bias.requires_grad_(False)
    guard.check_weights(4, model.named_parameters())


def test_error_names_the_non_finite_metric() -> None:
    check_finite("dpo", 3, eval_loss=1.0)
    with pytest.raises(StageError, match="diverged at step 3: eval margin nan"):
        check_finite("dpo", 3, eval_loss=1.0, eval_margin=math.nan)


@pytest.mark.parametrize(("norm", "applied", "result"), [(2.0, True, (2.0, False)), (None, True, (None, False))])
def test_result_of_a_deepspeed_step(norm: float | None, applied: bool, result: tuple[Any, bool]) -> None:
    engine = SimpleNamespace(get_global_grad_norm=lambda: norm, was_step_applied=lambda: applied)
    assert step_result(engine) == result


def test_pack_member_with_non_finite_gradients_keeps_its_weights_and_moments() -> None:
    torch.manual_seed(0)
    state = [torch.rand(3, 5) for _ in range(4)]
    weights, grads, exp_avg, exp_avg_sq = state
    hyperparams = StepHyperparams(*(torch.full((3,), value, dtype=torch.float64) for value in (0.1, 0.01, 1.0, 2.0)))
    others = [tensor[[0, 2]].clone() for tensor in state]
    other_hyperparams = StepHyperparams(
        *(getattr(hyperparams, name)[[0, 2]] for name in ("learning_rate", "weight_decay", "max_norm", "step"))
    )
    update(*others, other_hyperparams)
    before = [tensor[1].clone() for tensor in (weights, exp_avg, exp_avg_sq)]
    grads[1, 3] = math.nan
    norms = update(*state, hyperparams)
    assert not math.isfinite(norms[1])
    for tensor, expected in zip((weights, exp_avg, exp_avg_sq), before, strict=True):
        assert torch.equal(tensor[1], expected)
    for tensor, expected in zip((weights, exp_avg, exp_avg_sq), (others[0], others[2], others[3]), strict=True):
        assert torch.equal(tensor[[0, 2]], expected)
