"""The values that a training has at each of its steps: schedules, and what changes on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from tunery.spec import Training


@dataclass(frozen=True)
class Schedule:
    """By step, from 0 on."""

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]


def schedule(spec: Training[Any], steps: int) -> Schedule:
    """Of a training in transformers' Trainer, or one that does as it does."""
    shape = _shape(spec, steps)
    peaks = values_by_step("learning_rate", spec, steps)
    return Schedule(
        tuple(peak * shape(step) for step, peak in enumerate(peaks)), tuple(values_by_step("weight_decay", spec, steps))
    )


def values_by_step(field: Literal["learning_rate", "weight_decay"], spec: Training[Any], steps: int) -> list[float]:
    """The field's value, by step; of the learning rate its peak."""
    value = getattr(spec, field)
    assert value != "auto", "resolved"
    found: list[float] = [value] * steps
    for change in spec.schedule_overrides:
        if (other := getattr(change, field)) is not None:
            begin = override_step(change.after, steps)
            found[begin:] = [other] * (steps - begin)
    return found


def override_step(after: float, steps: int) -> int:
    """The first step with the values of a change, from 0 on: as `at_even_steps` (training/batches.py) has evaluations,
    so that a change after two of five comes with the step behind the second one."""
    return math.ceil(round(steps * after, 9))


def _shape(spec: Training[Any], steps: int) -> Callable[[int], float]:
    """Of the learning rate, by transformers' own schedules."""
    import torch
    from transformers import get_scheduler

    schedule = {"constant": "constant_with_warmup"}.get(spec.schedule, spec.schedule)
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    shape: Callable[[int], float] = get_scheduler(schedule, nothing, round(spec.warmup * steps), steps).lr_lambdas[0]
    return shape
