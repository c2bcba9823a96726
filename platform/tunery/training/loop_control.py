"""The parts of a training loop that do not depend on the trainer: when to log, evaluate, save and stop; the history of
metrics; complete checkpoints; reports to the search.

Three loops use it: transformers' Trainer (training_callback.py), PPO (ppo/ppo_worker.py) and each member of a pack
(packed/member.py). After an optimizer step a loop calls `end_step`, logs if `should_log`, evaluates if
`should_evaluate`, saves if `should_save`, and then calls `flush_reports`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tunery.errors import Stopped
from tunery.store.atomic_write import write_text
from tunery.training.batches import evenly_spaced_steps
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
"""Minimum time between two progress events, and between two checks for `job.stop_file`."""


class LoopControl:
    """State of a training loop after `step` optimizer steps (in PPO: batches of responses)."""

    def __init__(
        self,
        job: Job,
        steps: int,
        emit: Emit,
        *,
        has_eval_data: bool,
        logging_steps: int,
        save_steps: int,
        signature: str,
        rows_per_step: float,
        tokens_at: Callable[[int], int],
        report: Report,
        rank: int = 0,
        steps_per_batch: int = 1,
    ) -> None:
        """steps: number of steps of the training.

        logging_steps, save_steps: steps between logs and between checkpoints. signature: settings that must match to
        load a checkpoint (checkpoints.py). rows_per_step: rows trained on per step. tokens_at: returns the number of
        tokens trained on in the first n steps. steps_per_batch: steps that train on the same generated batch; no
        checkpoint is saved in between, since checkpoints do not contain the batch.
        """
        self.job, self.steps, self.emit = job, steps, emit
        self.step = self.resumed_from = self._saved_at = 0
        self.history: list[dict[str, float]] = []
        """Logged metrics, in order, including those of earlier attempts."""
        self.guard = DivergenceGuard(job.stage)
        self.first_step_at: float | None = None
        self._evaluate_at = frozenset(evenly_spaced_steps(steps, job.spec.num_evals) if has_eval_data else ())
        self._logging_steps, self._save_steps, self._steps_per_batch = logging_steps, save_steps, steps_per_batch
        self._signature, self._rank = signature, rank
        self._rows_per_step, self._tokens_at = rows_per_step, tokens_at
        self._report = report
        self._pending_reports: list[dict[str, float]] = []
        self._last_progress = 0.0
        self._stop_requested = False

    def resume(self) -> Path | None:
        """Restore history and step from the newest complete checkpoint with the same signature. Return that checkpoint,
        from which the caller loads model and optimizer; None if there is none. Call on all ranks.

        The evaluations up to the checkpoint are reported again at the next `flush_reports`.
        """
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
        """Set the number of finished steps, and emit progress."""
        self.step = step
        now = time.time()
        self.first_step_at = self.first_step_at or now
        if now - self._last_progress > PROGRESS_SECONDS or self.is_last_step:
            self._last_progress = now
            self.emit("progress", done=step, total=self.steps, unit="steps")
            self._stop_requested = self.job.stop_file is not None and self.job.stop_file.exists()

    def check_step(self, *, loss: float, grad_norm: float | None, learning_rate: float, skipped: bool) -> None:
        """Raise StageError if the training has diverged (divergence.py). Log the number of skipped steps if the step
        was skipped. Values must be the same on all ranks."""
        if self.guard.check_step(
            self.step, loss=loss, grad_norm=grad_norm, learning_rate=learning_rate, skipped=skipped
        ):
            self.log({SKIPPED_STEPS: float(self.guard.skipped_steps)})

    def raise_if_stopped(self) -> None:
        """Raise Stopped if `job.stop_file` exists. Call on all ranks; all of them stop at the same step."""
        if self.job.stop_file is not None and any_rank(self._stop_requested):
            raise Stopped(f"stopped at step {self.step}")

    @property
    def is_last_step(self) -> bool:
        return self.step == self.steps

    @property
    def should_log(self) -> bool:
        """Whether to log the metrics of this step. A logged loss is the mean since the last log, and a checkpoint does
        not contain the running sum, so every step that saves a checkpoint is logged too."""
        return self.step == 1 or self.step % self._logging_steps == 0 or self._keeps_checkpoint

    @property
    def should_evaluate(self) -> bool:
        return self.step in self._evaluate_at

    @property
    def should_save(self) -> bool:
        """Whether to save a checkpoint: not after the last step, nor after a skipped step, whose state may be bad."""
        if self.is_last_step or self.guard.last_was_skipped or self.step % self._steps_per_batch:
            return False
        return self._keeps_checkpoint or (self.should_log and self.step - self._saved_at >= self._save_steps)

    @property
    def is_saved(self) -> bool:
        """Whether this step has a checkpoint. Do not write it again: other trials may have been seeded from it."""
        return self.step == self._saved_at

    @property
    def _keeps_checkpoint(self) -> bool:
        """Whether the checkpoint of this step is copied to `job.checkpoint_dir`."""
        return self.job.checkpoint_dir is not None and self.should_evaluate

    def log(self, metrics: Mapping[str, float], runtime_metrics: Mapping[str, float] | None = None) -> None:
        """Append metrics to the history and emit them.

        `runtime_metrics` such as speeds differ from run to run, so they are emitted but not part of the history.
        Non-finite values, which belong to skipped steps, are omitted; `skipped_steps` counts those steps.
        """
        values = {name: float(value) for name, value in metrics.items() if math.isfinite(value)}
        if not values:
            return
        rows = {"rows": float(self.step * self._rows_per_step)}
        self.history.append({"step": float(self.step), **values, **rows})
        self.emit("metrics", step=self.step, values={**values, **(runtime_metrics or {}), **rows})

    def record_evaluation(self, metrics: Mapping[str, float], learning_rate: float | None = None) -> None:
        """Log the metrics of an evaluation, and queue them for the next `flush_reports`. Raises StageError if one is
        not finite."""
        check_finite(self.job.stage, self.step, learning_rate=learning_rate, **metrics)
        self.log(metrics)
        self._queue_report(self.step, metrics)

    def _queue_report(self, step: int, metrics: Mapping[str, float]) -> None:
        # A scheduler may stop a trial at any report. The evaluation of the last step is reported only with the artifact
        # (search/trial.py), so that a finished model is not lost.
        if 0 < step < self.steps:
            rows = round(step * self._rows_per_step)
            tokens = self._tokens_at(step)
            self._pending_reports.append(report_of(self.job.stage, step, self.steps, tokens, rows, metrics))

    def flush_reports(self) -> None:
        """Report the queued evaluations to the search. Call on all ranks, after the checkpoint of the step, if any, is
        complete. Raises Stopped on all ranks if the search stops the training."""
        pending, self._pending_reports = self._pending_reports, []
        stop = False
        for metrics in pending:
            stop = bool(self._report(metrics)) or stop
        if pending and any_rank(stop):
            raise Stopped(f"stopped at step {self.step}")

    # Checkpoints and the end.

    @property
    def checkpoint(self) -> Path:
        """Folder of the checkpoint of this step."""
        return self._checkpoints / f"checkpoint-{self.step}"

    @property
    def _checkpoints(self) -> Path:
        return self.job.staging_dir / "checkpoints"

    def check_weights(self, parameters: Any) -> None:
        """Raise StageError if a trained weight is not finite. Call on all ranks, before saving. `parameters`: iterable
        of (name, parameter)."""
        self.guard.check_weights(self.step, parameters)

    def complete_checkpoint(self) -> None:
        """Add the history to `checkpoint`, mark it as complete and remove older ones. Call on all ranks, each after it
        has written its part."""
        barrier()
        if self._rank == 0:
            write_history(self.checkpoint, self.history)
            mark_complete(self._checkpoints, self.step, self._signature)
            if self._keeps_checkpoint and self.job.checkpoint_dir is not None:
                hardlink_copy(self.checkpoint, self.job.checkpoint_dir)
        self._saved_at = self.step

    def check_end(self, parameters: Any) -> None:
        """Raise StageError if the last step was skipped or a trained weight is not finite. Call on all ranks, before
        the model is saved. `parameters`: iterable of (name, parameter)."""
        self.guard.check_end()
        self.check_weights(parameters)

    def write_outcome(self, facts: Mapping[str, Any], runtime_stats: Mapping[str, Any]) -> None:
        """Write history.jsonl to the artifact, and facts and runtime stats to `job.staging_dir`, where `run_training`
        reads them. Call on rank 0 only."""
        (self.job.out / HISTORY).write_text("".join(json.dumps(point) + "\n" for point in self.history))
        write_text(self.job.staging_dir / "outcome.json", json.dumps({"facts": facts, "runtime_stats": runtime_stats}))
