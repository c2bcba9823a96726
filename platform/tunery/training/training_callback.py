"""The callback of all transformers trainers: when to evaluate and to save, and which metrics to log."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunery.errors import Stopped
from tunery.training.checkpoints import hardlink_copy, mark_complete, write_history
from tunery.training.collectives import any_rank, mean_over_ranks
from tunery.training.divergence import DivergenceGuard, check_finite, step_result
from tunery.training.schedule import Schedule
from tunery.training.training_stats import SKIPPED_STEPS

Report = Callable[[int, dict[str, float]], None]
LOGGED_METRICS = ("loss", "learning_rate", "grad_norm")
"""Logged for all trainers, with all evaluation metrics (`eval_..`)."""


class TrainingCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluate and save at given steps, mark complete checkpoints, log metrics and check for divergence."""

    def __init__(
        self,
        evaluate_at: list[int],
        save_steps: int,
        checkpoints: Path,
        rows_per_step: float,
        total: int,
        emit: Callable[..., None],
        checkpoint_signature: str,
        report: Report,
        stage: str,
        schedule: Schedule,
        extra_metrics: Sequence[str] = (),
        iterations: int = 1,
        stop: Path | None = None,
        checkpoint_dir: Path | None = None,
    ) -> None:
        """evaluate_at: steps; save_steps: steps between checkpoints; total: steps of the training; iterations:
        optimizer steps per generated batch (no checkpoint is saved within one, since it does not hold the batch);
        checkpoint_dir: as in a Job."""
        self._metrics = {*LOGGED_METRICS, *extra_metrics}
        self._iterations = iterations
        self._stop, self._checkpoint_dir, self._schedule = stop, checkpoint_dir, schedule
        self._pending_report: dict[str, float] | None = None
        """Metrics of an evaluation, reported once its checkpoint is written."""
        self.evaluate_at = set(evaluate_at)
        self.save_steps = save_steps
        self.checkpoints = checkpoints
        self.rows_per_step = rows_per_step
        self.total = total
        self.emit = emit
        self.checkpoint_signature = checkpoint_signature
        self.report = report
        self.first_step_at: float | None = None
        self.history: list[dict[str, float]] = []
        """Logged metrics, including those of earlier attempts."""
        self._last_progress = 0.0
        self._saved_at = 0
        self._stage = stage
        self.guard = DivergenceGuard(stage)
        self._trainer: Any = None
        self._loss: torch.Tensor | float = 0.0
        """Loss of this rank, summed over the micro batches of the current step."""
        self._learning_rate = 0.0
        """Learning rate of the current step."""

    def attach(self, trainer: Any) -> None:
        """Record the loss of every micro batch: transformers (5.23) does not pass it to callbacks."""
        self._trainer, training_step = trainer, trainer.training_step

        def record_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = training_step(*args, **kwargs)
            self._loss = self._loss + loss.detach()
            return loss

        trainer.training_step = record_loss

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved_at = state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._learning_rate = self._schedule.learning_rates[state.global_step]
        groups = kwargs["optimizer"].param_groups
        for group in groups:
            group["lr"] = self._learning_rate
        # The second group of transformers holds the parameters without weight decay: biases and norms.
        groups[0]["weight_decay"] = self._schedule.weight_decays[state.global_step]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.time()
        if self.first_step_at is None:
            self.first_step_at = now
        self._check_step(state.global_step)
        stop_requested = False
        if now - self._last_progress > 0.5 or state.global_step == self.total:
            self._last_progress = now
            self.emit("progress", done=state.global_step, total=self.total, unit="steps")
            stop_requested = self._stop is not None and self._stop.exists()
        if self._stop is not None and any_rank(stop_requested):
            raise Stopped(f"stopped at step {state.global_step}")
        control.should_evaluate = state.global_step in self.evaluate_at
        # The logged loss is the mean since the last log, and checkpoints do not hold that sum: save only at logged
        # steps, so that a resumed run logs the same values.
        due = state.global_step - self._saved_at >= self.save_steps and control.should_log
        if control.should_evaluate and self._checkpoint_dir is not None:
            due = control.should_log = True
        due = due and not self.guard.last_was_skipped
        if due and state.global_step < self.total and state.global_step % self._iterations == 0:
            self.check_weights(state.global_step)
            control.should_save = True
            self._saved_at = state.global_step

    def _check_step(self, step: int) -> None:
        """Raise StageError, on all ranks, if the training has diverged."""
        loss, self._loss = mean_over_ranks(float(self._loss)), 0.0
        grad_norm, skipped = step_result(self._trainer.model_wrapped)
        learning_rate = self._learning_rate
        if self.guard.check_step(step, loss=loss, grad_norm=grad_norm, learning_rate=learning_rate, skipped=skipped):
            self._record(step, {SKIPPED_STEPS: float(self.guard.skipped_steps)})

    def check_weights(self, step: int) -> None:
        """Raise StageError if a trained weight is not finite. Call on all ranks, before saving."""
        self.guard.check_weights(step, self._trainer.model.named_parameters())

    def check_end(self) -> None:
        """Raise StageError if the training has diverged. Call on all ranks, before the model is saved."""
        self.guard.check_end()
        self.check_weights(self.total)

    def _record(self, step: int, values: dict[str, float]) -> None:
        values["rows"] = float(step * self.rows_per_step)
        self.history.append({"step": float(step), **values})
        self.emit("metrics", step=step, values=values)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        metrics = {
            name: value for name, value in (logs or {}).items() if name in self._metrics or name.startswith("eval_")
        }
        # Skipped steps can have non-finite values: those steps are counted, not logged.
        values = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if not values:
            return
        if "learning_rate" in values:  # transformers logs the constant rate of its own scheduler
            values["learning_rate"] = self._learning_rate
        self._record(state.global_step, values)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        check_finite(self._stage, state.global_step, learning_rate=self._learning_rate, **metrics or {})
        if control.should_save and self._checkpoint_dir is not None:
            self._pending_report = dict(metrics or {})
        else:
            self.report(state.global_step, dict(metrics or {}))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Mark the checkpoint as complete once all ranks have written their part, which removes older ones."""
        dist.barrier()
        if dist.get_rank() == 0:
            checkpoint = self.checkpoints / f"checkpoint-{state.global_step}"
            write_history(checkpoint, self.history)
            mark_complete(self.checkpoints, state.global_step, self.checkpoint_signature)
            if self._checkpoint_dir is not None and state.global_step in self.evaluate_at:
                hardlink_copy(checkpoint, self._checkpoint_dir)
        if self._pending_report is not None:
            pending, self._pending_report = self._pending_report, None
            self.report(state.global_step, pending)
