"""The final loss of a training."""

from __future__ import annotations

import random
from typing import Any

import pytest

from tunery.spec import Sft
from tunery.training.batches import Batching
from tunery.training.training_stats import logging_steps, training_facts

SPEC = Sft.model_validate_json("""{"kind": "sft", "data": "rows", "model": "base", "epochs": 1, "learning_rate": 1e-3,
 "global_batch_size": 4}""")


def final_loss(losses: list[float], logged_at: set[int]) -> Any:
    """Return the fact `loss` of a training. `losses`: of each step; `logged_at`: steps that log the mean loss since
    the last logged step."""
    history, last = [], 0
    for step in sorted(logged_at):
        history.append({"step": float(step), "loss": sum(losses[last:step]) / (step - last)})
        last = step
    return training_facts(SPEC, Batching(len(losses), 4, 1, 4, 1), history, 10, 5)["loss"]


@pytest.mark.parametrize("steps", [1, 3, 49, 50, 137, 1013])
def test_final_loss_does_not_depend_on_additional_logged_steps(steps: int) -> None:
    rng = random.Random(steps)
    losses = [rng.random() for _ in range(steps)]
    interval = logging_steps(steps)
    regular = {1, *range(interval, steps + 1, interval)}
    expected = losses[: steps // interval * interval][-5 * interval :]
    assert final_loss(losses, regular) == pytest.approx(sum(expected) / len(expected))
    additional = {rng.randint(1, steps) for _ in range(4)} | {steps}
    assert final_loss(losses, regular | additional) == pytest.approx(final_loss(losses, regular))
    assert final_loss([], set()) is None
