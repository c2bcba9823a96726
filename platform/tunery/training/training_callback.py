"""Steps of a training: when to evaluate and to save, and what is told of each."""

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
CURVES = ("loss", "learning_rate", "grad_norm")
"""What is told of a step, with all measures of the evaluations (`eval_..`)."""
GROUPS = ("reward", "kl", "entropy", "clip_fraction", "reward_deviation", "response_length", "cut_off")
MORE_CURVES = {
    "dpo": ("margin", "accuracy"),
    "kto": ("margin", "kl"),
    "grpo": GROUPS,
    "rloo": GROUPS,
}
"""By stage kind, what is told besides; under these names its trainer logs them."""


class TrainingCallback(TrainerCallback):  # type: ignore[misc]
    """Evaluates and saves at given steps, keeps only whole checkpoints, and reports the curves."""

    def __init__(
        self,
        evaluate_at: list[int],
        save_every: int,
        checkpoints: Path,
        rows_per_step: float,
        total: int,
        emit: Callable[..., None],
        written_by: str,
        report: Report,
        stage: str,
        more_curves: Sequence[str] = (),
        iterations: int = 1,
        stop: Path | None = None,
        kept: Path | None = None,
        course: Schedule | None = None,
    ) -> None:
        """`iterations`: steps over the same drawn answers. Those are in no checkpoint, so none is saved between.
        `kept`: as in a Job. `course`: of a training whose values change on the way."""
        self._curves = {*CURVES, *more_curves}
        self._iterations = iterations
        self._stop, self._kept, self._course = stop, kept, course
        self._due: dict[str, float] | None = None
        """Measures that are told once their checkpoint is there."""
        self.evaluate_at = set(evaluate_at)
        self.save_every = save_every
        self.checkpoints = checkpoints
        self.rows_per_step = rows_per_step
        self.total = total
        self.emit = emit
        self.written_by = written_by
        self.report = report
        self.first_step_at: float | None = None
        self.history: list[dict[str, float]] = []
        """Points of the curves, of earlier tries too."""
        self._last_progress = 0.0
        self._saved_at = 0
        self._stage = stage
        self.guard = DivergenceGuard(stage)
        self._trainer: Any = None
        self._loss: torch.Tensor | float = 0.0
        """Of this rank, over the micro batches of a step."""
        self._learning_rate = 0.0
        """Of the step that is being taken."""

    def attach(self, trainer: Any) -> None:
        """Listens to the loss of every micro batch: transformers (5.23) hands none to callbacks."""
        self._trainer, training_step = trainer, trainer.training_step

        def recording(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = training_step(*args, **kwargs)
            self._loss = self._loss + loss.detach()
            return loss

        trainer.training_step = recording

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._saved_at = state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        groups = kwargs["optimizer"].param_groups
        if self._course is not None:
            for group in groups:
                group["lr"] = self._course.learning_rates[state.global_step]
            # transformers has what is not decayed, biases and norms, in a second group.
            groups[0]["weight_decay"] = self._course.weight_decays[state.global_step]
        self._learning_rate = float(groups[0]["lr"])

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        now = time.time()
        if self.first_step_at is None:
            self.first_step_at = now
        self._check_step(state.global_step)
        stops = False
        if now - self._last_progress > 0.5 or state.global_step == self.total:
            self._last_progress = now
            self.emit("progress", done=state.global_step, total=self.total, unit="steps")
            stops = self._stop is not None and self._stop.exists()
        if self._stop is not None and any_rank(stops):
            raise Stopped(f"stopped at step {state.global_step}")
        control.should_evaluate = state.global_step in self.evaluate_at
        # A loss is logged as the mean since the last log, and that sum is not in a checkpoint: save at steps that are
        # logged, so that a resumed run logs the same points, however often checkpoints are written.
        due = state.global_step - self._saved_at >= self.save_every and control.should_log
        if control.should_evaluate and self._kept is not None:
            due = control.should_log = True
        due = due and not self.guard.last_was_skipped
        if due and state.global_step < self.total and state.global_step % self._iterations == 0:
            self.check_weights(state.global_step)
            control.should_save = True
            self._saved_at = state.global_step

    def _check_step(self, step: int) -> None:
        """Raises StageError, on all ranks, where the training has diverged."""
        loss, self._loss = mean_over_ranks(float(self._loss)), 0.0
        norm, skipped = step_result(self._trainer.model_wrapped)
        rate = self._learning_rate
        if self.guard.check_step(step, loss=loss, grad_norm=norm, learning_rate=rate, skipped=skipped):
            self._record(step, {SKIPPED_STEPS: float(self.guard.skipped_steps)})

    def check_weights(self, step: int) -> None:
        """All ranks take part, before they save anything."""
        self.guard.check_weights(step, self._trainer.model.named_parameters())

    def check_end(self) -> None:
        """All ranks take part, before the model is saved. Raises StageError where the training has diverged."""
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
        told = {name: value for name, value in (logs or {}).items() if name in self._curves or name.startswith("eval_")}
        # Of steps that were skipped there are values that are not finite: those steps are counted, not drawn.
        values = {name: float(value) for name, value in told.items() if math.isfinite(value)}
        if not values:
            return
        if self._course is not None and "learning_rate" in values:  # transformers tells its own
            values["learning_rate"] = self._course.learning_rates[state.global_step - 1]
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
        if control.should_save and self._kept is not None:
            self._due = dict(metrics or {})
        else:
            self.report(state.global_step, dict(metrics or {}))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint counts from when all ranks have written their part; then older ones go."""
        dist.barrier()
        if dist.get_rank() == 0:
            checkpoint = self.checkpoints / f"checkpoint-{state.global_step}"
            write_history(checkpoint, self.history)
            mark_complete(self.checkpoints, state.global_step, self.written_by)
            if self._kept is not None and state.global_step in self.evaluate_at:
                hardlink_copy(checkpoint, self._kept)
        if self._due is not None:
            due, self._due = self._due, None
            self.report(state.global_step, due)
