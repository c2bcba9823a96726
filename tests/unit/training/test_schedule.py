"""The learning rate schedule equals that of transformers; in PPO the first warm-up step is not 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from tunery.spec import Ppo, Sft, Training
from tunery.training.schedule import build_schedule


def sft(**fields: Any) -> Sft:
    defaults = {"kind": "sft", "data": "d", "model": "m", "epochs": 1.0, "learning_rate": 3e-4}
    return Sft.model_validate({**defaults, **fields})


def ppo(**fields: Any) -> Ppo:
    defaults = {"kind": "ppo", "data": "d", "model": "m", "reward": "r", "epochs": 1.0, "learning_rate": 1.0}
    return Ppo.model_validate({**defaults, **fields})


def transformers_learning_rates(spec: Training[Any], steps: int) -> list[float]:
    assert spec.learning_rate != "auto"
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=spec.learning_rate)
    name = {"constant": "constant_with_warmup"}.get(spec.schedule, spec.schedule)
    scheduler = get_scheduler(name, optimizer, round(spec.warmup * steps), steps)
    learning_rates = []
    for _ in range(steps):
        learning_rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return learning_rates


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.3, 0.99])
@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1013])
def test_learning_rates_equal_those_of_transformers_exactly(name: str, warmup: float, steps: int) -> None:
    spec = sft(schedule=name, warmup=warmup)
    assert list(build_schedule(spec, steps).learning_rates) == transformers_learning_rates(spec, steps)


def test_first_warmup_step_of_ppo_has_a_nonzero_learning_rate() -> None:
    learning_rates = build_schedule(ppo(warmup=0.3, schedule="linear"), 10).learning_rates
    assert learning_rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert learning_rates[4:] == pytest.approx([1 - done / 7 for done in range(1, 7)])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_ppo_decays_like_all_other_trainings(name: str) -> None:
    ppo_learning_rates = build_schedule(ppo(learning_rate=3e-4, schedule=name, warmup=0.25), 20).learning_rates
    assert ppo_learning_rates[5:] == build_schedule(sft(schedule=name, warmup=0.25), 20).learning_rates[5:]


def test_overrides_change_the_peak_and_the_weight_decay_of_later_steps_only() -> None:
    overrides = ({"after": 0.3, "learning_rate": 6e-4}, {"after": 0.6, "weight_decay": 0.5})
    plain, changed = (build_schedule(sft(weight_decay=0.1, schedule_overrides=given), 10) for given in ((), overrides))
    assert changed.learning_rates[:3] == plain.learning_rates[:3]
    assert changed.learning_rates[3:] == pytest.approx([2 * lr for lr in plain.learning_rates[3:]])
    assert changed.weight_decays == (0.1,) * 6 + (0.5,) * 4
