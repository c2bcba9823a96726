"""Divergence: a loss, gradient norm or weight that is not finite ends a training with an error.

transformers (5.23) logs a loss that is not finite as 0 (`logging_nan_inf_filter`), and DeepSpeed (0.19.8) skips the
update of a step whose gradient norm is not finite (all ZeRO stages but 0 in fp32): without these checks such a training
ends, and its model is saved. A skipped step leaves the weights as they were, so `MAX_SKIPPED_STEPS` in a row are
tolerated and counted (`skipped_steps`). A value that is not finite in a step that was taken ends the training at once.
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
"""In a row. One batch with a bad row costs one step; after an update that was too large all following steps fail."""


def _diverged(stage: str, step: int, what: str, learning_rate: float | None) -> StageError:
    rate = "" if learning_rate is None else f" (learning rate {learning_rate:g})"
    return StageError(
        stage,
        f"the training diverged at step {step:,}: {what}{rate}",
        cause="the updates were too large, or a row or a reward gives a loss that is not a finite number",
        remedy="lower `learning_rate` or `max_grad_norm`, or raise `warmup`; compute.precision: fp32 shows whether it "
        "is rounding",
    )


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in values.items())


def check_finite(stage: str, step: int, *, learning_rate: float | None = None, **values: float) -> None:
    """Raises StageError with the values that are not finite. They must be the same on every rank."""
    wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
    if wrong:
        raise _diverged(stage, step, _listed(wrong), learning_rate)


class DivergenceGuard:
    """Looks at every optimizer step of one training; the same for all kinds of trainers."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self.skipped_steps = 0
        self._learning_rate: float | None = None
        """Of the last step."""
        self._in_a_row: list[StageError] = []
        """What each of the last steps would have ended the training with, had it not been skipped."""

    @property
    def last_was_skipped(self) -> bool:
        """Then the training's state is in doubt: it is neither saved nor a result."""
        return bool(self._in_a_row)

    def resume(self, history: Sequence[Mapping[str, float]]) -> None:
        """Goes on counting after a checkpoint with this history."""
        self.skipped_steps = skipped_steps(history)

    def check_step(
        self, step: int, *, loss: float, grad_norm: float | None, learning_rate: float, skipped: bool
    ) -> bool:
        """Whether the step was skipped. All values are the same on every rank; `grad_norm` is None where DeepSpeed
        computes none. Raises StageError where the training has diverged."""
        values = {"loss": loss} if grad_norm is None else {"loss": loss, "gradient norm": grad_norm}
        finite = all(map(math.isfinite, values.values()))
        self._learning_rate = learning_rate
        if finite and not skipped:
            self._in_a_row = []
            return False
        error = _diverged(self._stage, step, _listed(values), learning_rate)
        if not skipped:
            raise error
        self.skipped_steps += 1
        self._in_a_row.append(error)
        if len(self._in_a_row) > MAX_SKIPPED_STEPS:
            raise self._in_a_row[0]
        return True

    def check_end(self) -> None:
        """Raises StageError where the last step was skipped: nothing shows that the training would have recovered."""
        if self._in_a_row:
            raise self._in_a_row[0]

    def check_weights(self, step: int, parameters: Any) -> None:
        """Before they are saved. `parameters`: (name, parameter) pairs. All ranks take part, each with what it holds.
        Raises StageError where a trained weight of any rank is not finite."""
        wrong = [name for name, weight in parameters if weight.requires_grad and not _is_finite(weight)]
        if any_rank(bool(wrong)):
            where = f"`{wrong[0]}`" if wrong else "another worker's part of the model"
            raise _diverged(self._stage, step, f"{where} has weights that are not finite", self._learning_rate)


def step_result(engine: Any) -> tuple[float | None, bool]:
    """Gradient norm before clipping and whether the update was skipped, of a DeepSpeed engine's last step. Both are the
    same on every rank."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm), not engine.was_step_applied()


def _is_finite(weight: Any) -> bool:
    """Of a parameter that ZeRO-3 has sharded, this rank's part."""
    own: torch.Tensor = getattr(weight, "ds_tensor", weight).detach().flatten()
    if hasattr(weight, "ds_numel"):
        # The last part is filled up with memory that nobody wrote (DeepSpeed 0.19.8, _partition_param).
        own = own[: max(0, weight.ds_numel - _partition(weight) * own.numel())]
    return bool(torch.isfinite(own).all())


def _partition(weight: Any) -> int:
    """Which part of a parameter that ZeRO-3 has sharded is this rank's."""
    rank: int = dist.get_rank(group=weight.ds_process_group)
    return rank
