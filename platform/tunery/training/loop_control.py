"""Everything in a training loop but the optimizer steps: when to log, evaluate, save and stop; the history of metrics;
complete checkpoints; reports to the search.

Three loops drive it: transformers' Trainer (training_callback.py), PPO (ppo/ppo_worker.py) and each member of a pack
(packed/member.py). After an optimizer step they call `end_step`, log if `should_log`, evaluate if `should_evaluate`,
save if `should_save`, and then `flush_reports`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunery.errors import Stopped
from tunery.training.batches import at_even_steps
from tunery.training.checkpoints import (
    HISTORY,
    hardlink_copy,
    last_checkpoint,
    mark_complete,
    read_history,
    remove_incompatible,
    step_of,
    write_history,
)
from tunery.training.collectives import any_rank, barrier, broadcast_rank0
from tunery.training.divergence import DivergenceGuard, check_finite
from tunery.training.job import Emit, Job, Report
from tunery.training.training_stats import SKIPPED_STEPS, evaluations_of, relog_history, report_of

PROGRESS_SECONDS = 0.5
"""Minimum time between two progress events, and between two looks for the file that stops the training."""


class LoopControl:
    """The state of a training loop, at the end of step `step` (0: before the first)."""

    def __init__(
        self,
        job: Job,
        steps: int,
        emit: Emit,
        *,
        has_eval_data: bool,
        log_period: int,
        save_period: int,
        signature: str,
        rows_per_step: float,
        tokens_at: Callable[[int], int],
        report: Report,
        rank: int = 0,
        steps_per_batch: int = 1,
    ) -> None:
        """log_period, save_period: steps; signature: of its checkpoints (checkpoints.py); tokens_at: tokens trained
        on up to a step; steps_per_batch: no checkpoint is saved within so many steps on one generated batch, since it
        does not hold the batch."""
        self.job, self.steps, self.emit = job, steps, emit
        self.step = self.resumed_from = self._saved_at = 0
        self.history: list[dict[str, float]] = []
        """Logged metrics, including those of earlier attempts."""
        self.guard = DivergenceGuard(job.stage)
        self.first_step_at: float | None = None
        self._evaluate_at = frozenset(at_even_steps(steps, job.spec.num_evals) if has_eval_data else ())
        self._log_period, self._save_period, self._steps_per_batch = log_period, save_period, steps_per_batch
        self._signature, self._rank = signature, rank
        self._rows_per_step, self._tokens_at = rows_per_step, tokens_at
        self._report = report
        self._pending_reports: list[dict[str, float]] = []
        self._last_progress = 0.0
        self._stop_requested = False

    def resume(self) -> Path | None:
        """Resume history and step from the newest complete checkpoint with the same signature and return it, or None.
        The caller loads its own state from it. Its evaluations are reported again. Call on all ranks."""
        if self._rank == 0:
            remove_incompatible(self._checkpoints, self._signature)
        barrier()
        checkpoint = broadcast_rank0(last_checkpoint(self._checkpoints, self._signature))
        barrier()
        if checkpoint is None:
            return None
        self.step = self.resumed_from = self._saved_at = step_of(checkpoint)
        self.history = read_history(checkpoint)
        self.guard.resume(self.history)
        if self.job.resume_from is not None and checkpoint.name == self.job.resume_from.name:
            relog_history(self.history, self.emit)
        for step, metrics in evaluations_of(self.history):
            self._queue_report(step, metrics)
        return checkpoint

    # After each step.

    def end_step(self, step: int) -> None:
        self.step = step
        now = time.time()
        self.first_step_at = self.first_step_at or now
        if now - self._last_progress > PROGRESS_SECONDS or self.is_last_step:
            self._last_progress = now
            self.emit("progress", done=step, total=self.steps, unit="steps")
            self._stop_requested = self.job.stop is not None and self.job.stop.exists()

    def check_step(self, *, loss: float, grad_norm: float | None, learning_rate: float, skipped: bool) -> None:
        """Raise StageError if the training has diverged (divergence.py); log a skipped step. Values must be the same on
        all ranks."""
        if self.guard.check_step(
            self.step, loss=loss, grad_norm=grad_norm, learning_rate=learning_rate, skipped=skipped
        ):
            self.log({SKIPPED_STEPS: float(self.guard.skipped_steps)})

    def raise_if_stopped(self) -> None:
        """Raise Stopped if it was requested. Call on all ranks, which stop at the same step."""
        if self.job.stop is not None and any_rank(self._stop_requested):
            raise Stopped(f"stopped at step {self.step}")

    @property
    def is_last_step(self) -> bool:
        return self.step == self.steps

    @property
    def should_log(self) -> bool:
        """At a population's evaluations too: losses are means since the last log, and a checkpoint does not hold their
        sum, so checkpoints are saved at logged steps only."""
        return self.step == 1 or self.step % self._log_period == 0 or self._keeps_checkpoint

    @property
    def should_evaluate(self) -> bool:
        return self.step in self._evaluate_at

    @property
    def should_save(self) -> bool:
        """Never after a skipped step, since the state may be bad."""
        if self.is_last_step or self.guard.last_was_skipped or self.step % self._steps_per_batch:
            return False
        return self._keeps_checkpoint or (self.should_log and self.step - self._saved_at >= self._save_period)

    @property
    def is_saved(self) -> bool:
        """Whether this step has a checkpoint. It is never rewritten: other trials may have been seeded from it."""
        return self.step == self._saved_at

    @property
    def _keeps_checkpoint(self) -> bool:
        """Whether this step's checkpoint is copied to `job.checkpoint_dir`."""
        return self.job.checkpoint_dir is not None and self.should_evaluate

    def log(self, metrics: Mapping[str, float], runtime_metrics: Mapping[str, float] | None = None) -> None:
        """Log metrics. `runtime_metrics`, such as speeds, differ from run to run and do not go into the history. Values
        that are not finite, of skipped steps, are left out: those steps are counted."""
        values = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if not values:
            return
        rows = {"rows": float(self.step * self._rows_per_step)}
        self.history.append({"step": float(self.step), **values, **rows})
        self.emit("metrics", step=self.step, values={**values, **(runtime_metrics or {}), **rows})

    def record_evaluation(self, metrics: Mapping[str, float], learning_rate: float | None = None) -> None:
        """Log an evaluation, and report it at the next `flush_reports`. Raises StageError if a metric is not finite."""
        check_finite(self.job.stage, self.step, learning_rate=learning_rate, **metrics)
        self.log(metrics)
        self._queue_report(self.step, metrics)

    def _queue_report(self, step: int, metrics: Mapping[str, float]) -> None:
        # A scheduler may stop a trial at any report, and a finished model must not be lost: the evaluation of the last
        # step is reported with the artifact (search/trial.py).
        if 0 < step < self.steps:
            rows = round(step * self._rows_per_step)
            tokens = self._tokens_at(step)
            self._pending_reports.append(report_of(self.job.stage, step, self.steps, tokens, rows, metrics))

    def flush_reports(self) -> None:
        """Report the evaluations to the search, now that the checkpoint of their step is written, if it has one."""
        pending, self._pending_reports = self._pending_reports, []
        for metrics in pending:
            self._report(metrics)

    # Checkpoints and the end.

    @property
    def checkpoint(self) -> Path:
        """Folder of this step's checkpoint."""
        return self._checkpoints / f"checkpoint-{self.step}"

    @property
    def _checkpoints(self) -> Path:
        return self.job.work / "checkpoints"

    def check_weights(self, parameters: Any) -> None:
        """Raise StageError if a trained weight is not finite. `parameters`: (name, parameter) pairs. Call on all ranks,
        before saving."""
        self.guard.check_weights(self.step, parameters)

    def complete_checkpoint(self) -> None:
        """Add the history to `checkpoint` and mark it as complete, once all ranks have written their part; this removes
        older ones. Call on all ranks."""
        barrier()
        if self._rank == 0:
            write_history(self.checkpoint, self.history)
            mark_complete(self._checkpoints, self.step, self._signature)
            if self._keeps_checkpoint and self.job.checkpoint_dir is not None:
                hardlink_copy(self.checkpoint, self.job.checkpoint_dir)
        self._saved_at = self.step

    def check_end(self, parameters: Any) -> None:
        """Raise StageError if the training has diverged. Call on all ranks, before the model is saved."""
        self.guard.check_end()
        self.check_weights(parameters)

    def write_outcome(self, facts: Mapping[str, Any], runtime_stats: Mapping[str, Any]) -> None:
        """Write the history into the artifact, and the outcome of the stage. Call on rank 0."""
        (self.job.out / HISTORY).write_text("".join(json.dumps(point) + "\n" for point in self.history))
        (self.job.work / "outcome.json").write_text(json.dumps({"facts": facts, "runtime_stats": runtime_stats}))
