"""Divergence checks: a non-finite loss, gradient norm or weight ends a training with an error.

transformers (5.23) logs a non-finite loss as 0 (`logging_nan_inf_filter`), and DeepSpeed (0.19.8) skips the update of a
step with a non-finite gradient norm (in all ZeRO stages, except 0 in fp32). Without these checks such a training would
finish and save its model. A skipped step leaves the weights unchanged, so up to `MAX_SKIPPED_STEPS` consecutive ones
are tolerated and counted (`skipped_steps`). A non-finite value in a step that was not skipped ends the training
immediately.
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
"""Maximum number of consecutive skipped steps. A batch with a bad row costs one step; after a too large update all
following steps fail."""


def _divergence_error(stage: str, step: int, reason: str, learning_rate: float | None) -> StageError:
    suffix = "" if learning_rate is None else f" (learning rate {learning_rate:g})"
    return StageError(
        stage,
        f"the training diverged at step {step:,}: {reason}{suffix}",
        cause="the updates were too large, or a row or a reward gives a loss that is not a finite number",
        remedy="lower `learning_rate` or `max_grad_norm`, or raise `warmup`; compute.precision: fp32 shows whether "
        "rounding is the cause",
    )


def _format_values(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values.items())


def check_finite(stage: str, step: int, *, learning_rate: float | None = None, **values: float) -> None:
    """Raise StageError with the values that are not finite. Values must be the same on every rank."""
    non_finite = {name: value for name, value in values.items() if not math.isfinite(value)}
    if non_finite:
        raise _divergence_error(stage, step, _format_values(non_finite), learning_rate)


class DivergenceGuard:
    """Checks every optimizer step of a training, and counts the skipped ones."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self.skipped_steps = 0
        self._learning_rate: float | None = None
        """Learning rate of the last step."""
        self._skipped_errors: list[StageError] = []
        """One error per skipped step since the last step that was not skipped."""

    @property
    def last_was_skipped(self) -> bool:
        """Whether the last step was skipped. Its state may be bad, so do not save it."""
        return bool(self._skipped_errors)

    def resume(self, history: Sequence[Mapping[str, float]]) -> None:
        """Restore the number of skipped steps from the history of a checkpoint."""
        self.skipped_steps = skipped_steps(history)

    def check_step(
        self, step: int, *, loss: float, grad_norm: float | None, learning_rate: float, skipped: bool
    ) -> bool:
        """Return whether the step was skipped. Raises StageError if the training has diverged.

        grad_norm: before clipping; None if DeepSpeed computes none. skipped: whether the optimizer made no update. All
        values must be the same on every rank.
        """
        values = {"loss": loss} if grad_norm is None else {"loss": loss, "gradient norm": grad_norm}
        is_finite = all(map(math.isfinite, values.values()))
        self._learning_rate = learning_rate
        if is_finite and not skipped:
            self._skipped_errors = []
            return False
        error = _divergence_error(self._stage, step, _format_values(values), learning_rate)
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
        """Raise StageError if a trained weight of any rank is not finite. Call on all ranks, before saving.
        `parameters`: iterable of (name, parameter)."""
        non_finite = [name for name, weight in parameters if weight.requires_grad and not _is_finite(weight)]
        if any_rank(bool(non_finite)):
            where = f"`{non_finite[0]}`" if non_finite else "another worker's shard of the model"
            reason = f"{where} has weights that are not finite"
            raise _divergence_error(self._stage, step, reason, self._learning_rate)


def step_result(engine: Any) -> tuple[float | None, bool]:
    """Return the gradient norm before clipping (None if DeepSpeed computes none) of the engine's last step, and whether
    its update was skipped. Both are the same on every rank."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm), not engine.was_step_applied()


def _is_finite(weight: Any) -> bool:
    """Whether all elements of a parameter are finite; of a parameter sharded by ZeRO-3, those of this rank's shard."""
    values: torch.Tensor = getattr(weight, "ds_tensor", weight).detach().flatten()
    if hasattr(weight, "ds_numel"):
        # The last shard is padded with uninitialized memory (DeepSpeed 0.19.8, _partition_param).
        values = values[: max(0, weight.ds_numel - _shard_index(weight) * values.numel())]
    return bool(torch.isfinite(values).all())


def _shard_index(weight: Any) -> int:
    """Return the index of this rank's shard of a parameter that ZeRO-3 shards."""
    rank: int = dist.get_rank(group=weight.ds_process_group)
    return rank
