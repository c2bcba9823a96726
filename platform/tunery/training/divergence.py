"""Divergence: a non-finite loss, gradient norm or weight ends a training with an error.

transformers (5.23) logs a non-finite loss as 0 (`logging_nan_inf_filter`), and DeepSpeed (0.19.8) skips the update of a
step with a non-finite gradient norm (in all ZeRO stages, except 0 in fp32). Without these checks such a training would
finish and save its model. A skipped step leaves the weights unchanged, so up to `MAX_SKIPPED_STEPS` consecutive ones
are tolerated and counted (`skipped_steps`). A non-finite value in a step that was not skipped ends the training at
once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from tunery.errors import StageError
from tunery.training.collectives import any_rank
from tunery.training.training_stats import skipped_steps

MAX_SKIPPED_STEPS = 3
"""Consecutive ones. A batch with a bad row costs one step; after a too large update all following steps fail."""


def _diverged(stage: str, step: int, what: str, learning_rate: float | None) -> StageError:
    suffix = "" if learning_rate is None else f" (learning rate {learning_rate:g})"
    return StageError(
        stage,
        f"the training diverged at step {step:,}: {what}{suffix}",
        cause="the updates were too large, or a row or a reward gives a loss that is not a finite number",
        remedy="lower `learning_rate` or `max_grad_norm`, or raise `warmup`; compute.precision: fp32 shows whether it "
        "is rounding",
    )


def _format_values(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values.items())


def check_finite(stage: str, step: int, *, learning_rate: float | None = None, **values: float) -> None:
    """Raise StageError with the values that are not finite. Values must be the same on every rank."""
    non_finite = {name: value for name, value in values.items() if not math.isfinite(value)}
    if non_finite:
        raise _diverged(stage, step, _format_values(non_finite), learning_rate)


class DivergenceGuard:
    """Checks every optimizer step of a training; shared by all trainers."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self.skipped_steps = 0
        self._learning_rate: float | None = None
        """Learning rate of the last step."""
        self._skipped_errors: list[StageError] = []
        """The errors of the latest consecutive skipped steps."""

    @property
    def last_was_skipped(self) -> bool:
        """Whether the last step was skipped: the state may be bad, so it is neither saved nor used as a result."""
        return bool(self._skipped_errors)

    def resume(self, history: Sequence[Mapping[str, float]]) -> None:
        """Continue the count of a checkpoint with this history."""
        self.skipped_steps = skipped_steps(history)

    def check_step(
        self, step: int, *, loss: float, grad_norm: float | None, learning_rate: float, skipped: bool
    ) -> bool:
        """Return whether the step was skipped. All values must be the same on every rank; `grad_norm` is None if
        DeepSpeed computes none. Raises StageError if the training has diverged."""
        values = {"loss": loss} if grad_norm is None else {"loss": loss, "gradient norm": grad_norm}
        finite = all(map(math.isfinite, values.values()))
        self._learning_rate = learning_rate
        if finite and not skipped:
            self._skipped_errors = []
            return False
        error = _diverged(self._stage, step, _format_values(values), learning_rate)
        if not skipped:
            raise error
        self.skipped_steps += 1
        self._skipped_errors.append(error)
        if len(self._skipped_errors) > MAX_SKIPPED_STEPS:
            raise self._skipped_errors[0]
        return True

    def check_end(self) -> None:
        """Raise StageError if the last step was skipped, since the training may not have recovered."""
        if self._skipped_errors:
            raise self._skipped_errors[0]

    def check_weights(self, step: int, parameters: Any) -> None:
        """Raise StageError if a trained weight of any rank is not finite. `parameters`: (name, parameter) pairs. Call
        on all ranks, before saving."""
        non_finite = [name for name, weight in parameters if weight.requires_grad and not _is_finite(weight)]
        if any_rank(bool(non_finite)):
            where = f"`{non_finite[0]}`" if non_finite else "another worker's part of the model"
            raise _diverged(self._stage, step, f"{where} has weights that are not finite", self._learning_rate)


def step_result(engine: Any) -> tuple[float | None, bool]:
    """Return the gradient norm before clipping, and whether the update was skipped, of a DeepSpeed engine's last step.
    Both are the same on every rank."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm), not engine.was_step_applied()


def _is_finite(weight: Any) -> bool:
    """Whether a parameter is finite; of one sharded by ZeRO-3, this rank's shard."""
    values: torch.Tensor = getattr(weight, "ds_tensor", weight).detach().flatten()
    if hasattr(weight, "ds_numel"):
        # The last shard is padded with uninitialized memory (DeepSpeed 0.19.8, _partition_param).
        values = values[: max(0, weight.ds_numel - _shard_index(weight) * values.numel())]
    return bool(torch.isfinite(values).all())


def _shard_index(weight: Any) -> int:
    """Index of this rank's shard of a parameter sharded by ZeRO-3."""
    rank: int = dist.get_rank(group=weight.ds_process_group)
    return rank
