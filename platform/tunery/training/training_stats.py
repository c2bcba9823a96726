"""What is told of a training at its end, and how often on the way; the same whoever computes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tunery.spec import Compute, Training
from tunery.training.batches import Batching

LATE_PERIODS = 5
SKIPPED_STEPS = "skipped_steps"
"""In a history, at each optimizer step without an update: how many there are so far (training/divergence.py)."""


def log_period(steps: int) -> int:
    """Steps between the points of a loss curve, of which there are 50 to 100; the first step is told too."""
    return max(1, steps // 50)


def save_period(compute: Compute, steps: int) -> int:
    """Steps between checkpoints."""
    return max(20, steps // 10) if compute.save_steps == "auto" else compute.save_steps


def report_of(
    stage: str, step: int, steps: int, tokens: float, rows: float, metrics: Mapping[str, float]
) -> dict[str, float]:
    """What a search's scheduler hears of an evaluation: progress (`share`: of its `steps`), and the metrics as a search
    names them."""
    measured = {f"{stage}.{name}": value for name, value in metrics.items() if name.startswith("eval_")}
    return {"steps": float(step), "share": step / steps, "tokens": float(tokens), "rows": float(rows), **measured}


def evaluations_of(history: Sequence[Mapping[str, float]]) -> Iterator[tuple[int, dict[str, float]]]:
    """Step and measures of each evaluation of a curve. A training that goes on from a checkpoint reports them again: a
    search that was killed may not have heard of the last ones, and knows the others (search/schedulers.py)."""
    for point in history:
        if measured := {name: value for name, value in point.items() if name.startswith("eval_")}:
            yield int(point["step"]), measured


def relog_history(history: Sequence[Mapping[str, float]], emit: Callable[..., None]) -> None:
    """The curve of another training, as far as this one begins with it: its log shall be whole by itself."""
    for point in history:
        emit("metrics", step=int(point["step"]), values={name: point[name] for name in point if name != "step"})


def training_facts(
    spec: Training[Any], batching: Batching, history: Sequence[Mapping[str, float]], parameters: int, trainable: int
) -> dict[str, Any]:
    """The loss is the mean over the last five periods of the curve; of the evaluations the one at the end.
    skipped_steps: optimizer steps without an update."""
    evals = [point for point in history if "eval_loss" in point]
    return {
        "steps": batching.steps,
        "epochs": spec.epochs,
        "global_batch_size": batching.global_batch_size,
        "learning_rate": spec.learning_rate,
        "parameters": parameters,
        "trainable": trainable,
        "loss": _late_loss(history, batching.steps),
        "eval_loss": evals[-1]["eval_loss"] if evals else None,
        "skipped_steps": skipped_steps(history),
    }


def skipped_steps(history: Sequence[Mapping[str, float]]) -> int:
    """How many steps of a training were skipped."""
    return int(max((point[SKIPPED_STEPS] for point in history if SKIPPED_STEPS in point), default=0))


def _late_loss(history: Sequence[Mapping[str, float]], steps: int) -> float | None:
    """By steps, not by points: a training in a population has further points, at its evaluations
    (training/training_callback.py)."""
    period = log_period(steps)
    end = steps // period * period
    points = [(int(point["step"]), point["loss"]) for point in history if "loss" in point and point["step"] <= end]
    found = [
        (step - before, loss)
        for (before, _), (step, loss) in pairwise([(0, 0.0), *points])
        if step > end - LATE_PERIODS * period
    ]
    return sum(taken * loss for taken, loss in found) / sum(taken for taken, _ in found) if found else None
