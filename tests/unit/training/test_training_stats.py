"""Statistics at the end of a training."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tunery.spec import Sft
from tunery.training.batches import Batching
from tunery.training.training_stats import log_period, training_facts

SPEC = Sft.model_validate_json("""{"kind": "sft", "data": "rows", "model": "base", "epochs": 1, "learning_rate": 1e-3,
 "global_batch_size": 4}""")


def loss_of(losses: list[float], told_at: set[int]) -> Any:
    """`losses`: of each step; `told_at`: the steps at which the mean since the last one is told."""
    history, since = [], 0
    for step in sorted(told_at):
        history.append({"step": float(step), "loss": sum(losses[since:step]) / (step - since)})
        since = step
    return training_facts(SPEC, Batching(len(losses), 4, 1, 4, 1), history, 10, 5)["loss"]


@pytest.mark.parametrize("steps", [1, 3, 49, 50, 137, 1013])
def test_the_loss_does_not_depend_on_further_points_of_its_curve(steps: int) -> None:
    chance = random.Random(steps)
    losses = [chance.random() for _ in range(steps)]
    period = log_period(steps)
    own = {1, *range(period, steps + 1, period)}
    expected = losses[: steps // period * period][-5 * period :]
    assert loss_of(losses, own) == pytest.approx(sum(expected) / len(expected))
    further = {chance.randint(1, steps) for _ in range(4)} | {steps}
    assert loss_of(losses, own | further) == pytest.approx(loss_of(losses, own))
    assert loss_of([], set()) is None
