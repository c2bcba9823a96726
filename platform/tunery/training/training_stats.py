"""Logging and checkpoint periods, reports and final statistics, shared by all trainers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tunery.spec import Compute, Training
from tunery.training.batches import Batching

FINAL_LOSS_PERIODS = 5
"""Logging periods that the final loss is averaged over."""
SKIPPED_STEPS = "skipped_steps"
"""Metric logged at each skipped optimizer step: the number of skipped steps so far (training/divergence.py)."""


def log_period(steps: int) -> int:
    """Steps between logged losses, 50 to 100 in all; the first step is logged too."""
    return max(1, steps // 50)


def save_period(compute: Compute, steps: int, min_steps: int = 20) -> int:
    """Steps between checkpoints; `auto` is a tenth of all, but at least `min_steps`."""
    return max(min_steps, steps // 10) if compute.save_steps == "auto" else compute.save_steps


def report_of(
    stage: str, step: int, steps: int, tokens: float, rows: float, metrics: Mapping[str, float]
) -> dict[str, float]:
    """Return the report of an evaluation for the search's scheduler: progress (`share`: fraction of all `steps`), and
    metrics as `<stage>.<metric>`."""
    metric_values = {f"{stage}.{name}": value for name, value in metrics.items() if name.startswith("eval_")}
    return {"steps": float(step), "share": step / steps, "tokens": float(tokens), "rows": float(rows), **metric_values}


def evaluations_of(history: Sequence[Mapping[str, float]]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and metrics of each evaluation in `history`. A training that resumes from a checkpoint reports them
    again: a search that was killed may have missed the last ones, and it ignores the others (search/schedulers.py)."""
    for point in history:
        if metrics := {name: value for name, value in point.items() if name.startswith("eval_")}:
            yield int(point["step"]), metrics


def relog_history(history: Sequence[Mapping[str, float]], emit: Callable[..., None]) -> None:
    """Log the history of the training that this one was seeded from, so that its own event log is complete."""
    for point in history:
        emit("metrics", step=int(point["step"]), values={name: point[name] for name in point if name != "step"})


def training_facts(
    spec: Training[Any], batching: Batching, history: Sequence[Mapping[str, float]], parameters: int, trainable: int
) -> dict[str, Any]:
    """Return the final statistics. loss: mean over the last five logging periods; eval_loss: of the last evaluation;
    skipped_steps: optimizer steps without an update."""
    evals = [point for point in history if "eval_loss" in point]
    return {
        "steps": batching.steps,
        "epochs": spec.epochs,
        "global_batch_size": batching.global_batch_size,
        "learning_rate": spec.learning_rate,
        "parameters": parameters,
        "trainable": trainable,
        "loss": _final_loss(history, batching.steps),
        "eval_loss": evals[-1]["eval_loss"] if evals else None,
        "skipped_steps": skipped_steps(history),
    }


def num_elements(parameter: Any) -> int:
    """Number of elements; a parameter sharded by ZeRO-3 has its full size as `ds_numel`."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def peak_memory_bytes(device: str) -> int:
    """Peak memory of this worker since `free_memory` (workers/process_state.py): of its GPU, or resident memory."""
    if device == "gpu":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def skipped_steps(history: Sequence[Mapping[str, float]]) -> int:
    """Return the number of skipped steps of a training."""
    return int(max((point[SKIPPED_STEPS] for point in history if SKIPPED_STEPS in point), default=0))


def _final_loss(history: Sequence[Mapping[str, float]], steps: int) -> float | None:
    """Mean loss of the last logging periods, weighted by steps: a training in a population logs additional losses at
    its evaluations (training/training_callback.py)."""
    period = log_period(steps)
    end = steps // period * period
    points = [(int(point["step"]), point["loss"]) for point in history if "loss" in point and point["step"] <= end]
    weighted = [
        (step - before, loss)
        for (before, _), (step, loss) in pairwise([(0, 0.0), *points])
        if step > end - FINAL_LOSS_PERIODS * period
    ]
    if not weighted:
        return None
    return sum(num_steps * loss for num_steps, loss in weighted) / sum(num_steps for num_steps, _ in weighted)
