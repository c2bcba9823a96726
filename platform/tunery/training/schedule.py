"""Learning rate and weight decay of each step: schedules and `schedule_overrides`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tunery.spec import Training


@dataclass(frozen=True)
class Schedule:
    """Values by step, from 0."""

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]


def schedule(spec: Training[Any], steps: int) -> Schedule:
    """Return the schedule of a training, the same as in transformers' Trainer."""
    shape = _lr_shape(spec, steps)
    peaks = values_by_step("learning_rate", spec, steps)
    return Schedule(
        tuple(peak * shape(step) for step, peak in enumerate(peaks)), tuple(values_by_step("weight_decay", spec, steps))
    )


def values_by_step(field: Literal["learning_rate", "weight_decay"], spec: Training[Any], steps: int) -> list[float]:
    """Value of the field at each step; for the learning rate, the peak of the schedule."""
    value = getattr(spec, field)
    assert value != "auto", "resolved"
    values: list[float] = [value] * steps
    for override in spec.schedule_overrides:
        if (new_value := getattr(override, field)) is not None:
            start = override_step(override.after, steps)
            values[start:] = [new_value] * (steps - start)
    return values


def override_step(after: float, steps: int) -> int:
    """Return the first step with the values of an override, from 0. It matches `at_even_steps` (training/batches.py):
    an override after 2 of 5 evaluations starts with the step after the second one."""
    return math.ceil(round(steps * after, 9))


def _lr_shape(spec: Training[Any], steps: int) -> Callable[[int], float]:
    """Return transformers' schedule as a function of the step, 1 at the peak."""
    import torch
    from transformers import get_scheduler

    schedule = {"constant": "constant_with_warmup"}.get(spec.schedule, spec.schedule)
    dummy_optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    shape: Callable[[int], float] = get_scheduler(
        schedule, dummy_optimizer, round(spec.warmup * steps), steps
    ).lr_lambdas[0]
    return shape
