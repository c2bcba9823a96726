"""Learning rate and weight decay of each optimizer step, for all training loops.

With T steps, w = round(`warmup` * T) of them for the warm-up, and steps counted from 0:

    lr(t) = peak(t) * (t + offset) / max(1, w + offset)     t < w   (warm-up)
            peak(t) * 1                                     t >= w, `constant`
            peak(t) * (T - t) / (T - w)                     t >= w, `linear`
            peak(t) * (1 + cos(pi (t - w) / (T - w))) / 2   t >= w, `cosine`

peak(t) and the weight decay are those of the stage, or of the last of its `schedule_overrides` that starts at or before
step t.

`offset` (`Training.warmup_offset`) is 0 as in transformers' schedules, where the first warm-up step has a learning rate
of 0. It is 1 in PPO, since a batch of responses is too expensive for a step without an update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from tunery.spec import Training


@dataclass(frozen=True)
class Schedule:
    """Hyperparameters of each step, by its index from 0."""

    learning_rates: tuple[float, ...]
    weight_decays: tuple[float, ...]


def build_schedule(spec: Training[Any], steps: int) -> Schedule:
    """Return the schedule of a training with `steps` optimizer steps (in PPO: batches of responses)."""
    peaks = _values_by_step("learning_rate", spec, steps)
    return Schedule(
        tuple(peak * _fraction_of_peak(spec, step, steps) for step, peak in enumerate(peaks)),
        tuple(_values_by_step("weight_decay", spec, steps)),
    )


def override_step(after: float, steps: int) -> int:
    """Return the index of the first step with the values of an override. It matches `evenly_spaced_steps`
    (training/batches.py): an override after 2 of 5 evaluations starts with the step after the second one."""
    return math.ceil(round(steps * after, 9))


def _values_by_step(field: Literal["learning_rate", "weight_decay"], spec: Training[Any], steps: int) -> list[float]:
    """Return the value of the field at each step, with its overrides; for the learning rate, the peak."""
    value = getattr(spec, field)
    assert value != "auto", "resolved"
    values: list[float] = [value] * steps
    for override in spec.schedule_overrides:
        if (new_value := getattr(override, field)) is not None:
            start = override_step(override.after, steps)
            values[start:] = [new_value] * (steps - start)
    return values


def _fraction_of_peak(spec: Training[Any], step: int, steps: int) -> float:
    """Return lr(step) / peak(step)."""
    warmup, offset = round(spec.warmup * steps), spec.warmup_offset
    if step < warmup:
        return (step + offset) / max(1, warmup + offset)
    match spec.schedule:
        case "constant":
            return 1.0
        case "linear":
            return (steps - step) / (steps - warmup)
        case "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * ((step - warmup) / (steps - warmup))))
