"""Steps between logs and between checkpoints, reports to the search, and statistics for the facts, for all trainers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

from tunery.spec import Compute, Training
from tunery.training.batches import Batching

NUM_FINAL_LOSSES = 5
"""Number of logged losses that the final loss is averaged over."""
SKIPPED_STEPS = "skipped_steps"
"""Metric that is logged at each skipped step: the number of skipped steps so far (training/divergence.py)."""


def logging_steps(steps: int) -> int:
    """Return the steps between two logged losses of a training with `steps` steps. A training of 50 steps or more logs
    50 to 100 losses, in addition to that of the first step."""
    return max(1, steps // 50)


def save_steps(compute: Compute, steps: int, min_steps: int = 20) -> int:
    """Return the steps between two checkpoints; `save_steps: auto` is a tenth of `steps`, but at least `min_steps`."""
    return max(min_steps, steps // 10) if compute.save_steps == "auto" else compute.save_steps


def report_of(
    stage: str, step: int, steps: int, tokens: float, rows: float, metrics: Mapping[str, float]
) -> dict[str, float]:
    """Return the report of an evaluation to the search's scheduler: the progress after `step` of `steps` steps (`share`
    is its fraction), and the eval metrics as `<stage>.<metric>`."""
    metric_values = {f"{stage}.{name}": value for name, value in metrics.items() if name.startswith("eval_")}
    return {"steps": float(step), "share": step / steps, "tokens": float(tokens), "rows": float(rows), **metric_values}


def evaluations_of(history: Sequence[Mapping[str, float]]) -> Iterator[tuple[int, dict[str, float]]]:
    """Yield step and metrics of each evaluation in `history`. A training that resumes from a checkpoint reports them
    again: a search that was killed may have missed the last ones, and it ignores the others (search/schedulers.py)."""
    for entry in history:
        if metrics := {name: value for name, value in entry.items() if name.startswith("eval_")}:
            yield int(entry["step"]), metrics


def relog_history(history: Sequence[Mapping[str, float]], emit: Callable[..., None]) -> None:
    """Emit the history of the training that this one was seeded from, so that its own event log is complete."""
    for entry in history:
        emit("metrics", step=int(entry["step"]), values={name: entry[name] for name in entry if name != "step"})


def training_facts(
    spec: Training[Any],
    batching: Batching,
    history: Sequence[Mapping[str, float]],
    num_parameters: int,
    num_trainable: int,
) -> dict[str, Any]:
    """Return the facts that all stage kinds share. loss: mean of the last five logged losses, weighted by steps;
    eval_loss: that of the last evaluation, or None; skipped_steps: number of optimizer steps without an update."""
    evals = [entry for entry in history if "eval_loss" in entry]
    return {
        "steps": batching.steps,
        "epochs": spec.epochs,
        "global_batch_size": batching.global_batch_size,
        "learning_rate": spec.learning_rate,
        "parameters": num_parameters,
        "trainable": num_trainable,
        "loss": _final_loss(history, batching.steps),
        "eval_loss": evals[-1]["eval_loss"] if evals else None,
        "skipped_steps": skipped_steps(history),
    }


def num_elements(parameter: Any) -> int:
    """Return the number of elements of a parameter, whether ZeRO-3 shards it or not."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def peak_memory_bytes(device: str) -> int:
    """Return the peak memory of this worker since `free_memory` (workers/process_state.py): GPU memory allocated by
    torch, or on a CPU the resident memory of the process."""
    if device == "gpu":
        import torch

        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def skipped_steps(history: Sequence[Mapping[str, float]]) -> int:
    """Return the number of skipped steps in a training's history."""
    return int(max((entry[SKIPPED_STEPS] for entry in history if SKIPPED_STEPS in entry), default=0))


def _final_loss(history: Sequence[Mapping[str, float]], steps: int) -> float | None:
    """Return the mean of the last losses, weighted by the steps that each was averaged over: a training in a population
    logs additional losses at its evaluations (loop_control.py, `should_log`)."""
    interval = logging_steps(steps)
    end = steps // interval * interval
    losses = [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry and entry["step"] <= end]
    weighted = [
        (step - previous_step, loss)
        for (previous_step, _), (step, loss) in pairwise([(0, 0.0), *losses])
        if step > end - NUM_FINAL_LOSSES * interval
    ]
    if not weighted:
        return None
    return sum(num_steps * loss for num_steps, loss in weighted) / sum(num_steps for num_steps, _ in weighted)
