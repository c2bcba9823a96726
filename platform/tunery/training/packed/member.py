"""One training of a pack: its progress, its next batch, its checkpoints and its artifact."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunery.errors import StageError
from tunery.events.event_log import EventLog
from tunery.models.load import write_base
from tunery.spec import Sft
from tunery.training.batches import at_even_steps, data_order, plan_training
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
from tunery.training.divergence import DivergenceGuard, check_finite
from tunery.training.job import Job, Report
from tunery.training.packed.weightless_base import adapter_of
from tunery.training.reload_check import PROBED, LanguageProbe, check_saved
from tunery.training.schedule import schedule
from tunery.training.sequences import TrainingSequences, mixture_facts, mixture_of
from tunery.training.training_stats import (
    SKIPPED_STEPS,
    evaluations_of,
    log_period,
    relog_history,
    report_of,
    save_period,
    training_facts,
)

CHECKPOINT_SIGNATURE = "a pack"
"""Signature of a pack's checkpoints: any pack can load them, DeepSpeed can't."""
STATE = "state.pt"


@dataclass(frozen=True)
class MemberBatch:
    """A member's batch and hyperparameters for one step of the pack."""

    rows: list[int]
    """Indices of its sequences, by descending length."""
    learning_rate: float
    weight_decay: float
    step: int
    """From 1."""


class Member:
    """A training and its adapter, `peft_model` (weightless_base.with_adapter). Resumes from its last checkpoint."""

    def __init__(
        self,
        job: Job,
        data: TrainingSequences,
        eval_data: TrainingSequences,
        tokenizer: Any,
        peft_model: Any,
        base_parameters: int,
    ) -> None:
        assert isinstance(job.spec, Sft)
        self.job, self.data, self.eval_data = job, data, eval_data
        self.spec: Sft = job.spec
        self._tokenizer, self._peft_model, self._base_parameters = tokenizer, peft_model, base_parameters
        self._log = EventLog(
            job.events / f"{job.trial or 'stage'}-{job.stage}-0.jsonl", stage=job.stage, trial=job.trial
        )
        self.batching = plan_training(job.spec, len(data), 1, "auto")
        self._order = data_order(data.lengths, self.batching.steps, self._size, job.seed, mixture_of(job.spec, data))
        self._schedule = schedule(job.spec, self.batching.steps)
        self._evaluate_at = set(at_even_steps(self.batching.steps, job.spec.num_evals) if len(eval_data) else [])
        self._log_period = log_period(self.batching.steps)
        self._save_period = save_period(job.compute, self.batching.steps)
        self.adapter = adapter_of(peft_model)
        self.step = 0
        self.guard = DivergenceGuard(job.stage)
        self.error: StageError | None = None
        """The error that ended this training; the other members continue."""
        self.history: list[dict[str, float]] = []
        self._losses: list[float] = []
        self._last_progress = 0.0
        self._started_at, self._first_step_at, self._session_tokens = time.time(), 0.0, 0
        self._pending_reports: list[dict[str, float]] = []
        """Evaluations to report once their checkpoint is written, including those of earlier attempts."""
        self.probe = LanguageProbe(job, data.first(PROBED), base_parameters)
        remove_incompatible(self._checkpoints, CHECKPOINT_SIGNATURE)
        self.resumed_from = self._saved_at = self._load_checkpoint()

    @property
    def ended(self) -> bool:
        return self.step == self.batching.steps or self.error is not None

    def attempt(self, work: Callable[[], None]) -> None:
        """Run `work`; an error ends this member only."""
        if self.error is None:
            try:
                work()
            except StageError as error:
                self.error = error

    def next_batch(self) -> MemberBatch:
        start = self.step * self._size
        return MemberBatch(
            self._order[start : start + self._size].tolist(),
            self._schedule.learning_rates[self.step],
            self._schedule.weight_decays[self.step],
            self.step + 1,
        )

    def record_step(self, loss: float, grad_norm: float) -> None:
        """Record a finished step: `loss` in nats per loss token, `grad_norm` before clipping. Raises StageError if the
        training has diverged."""
        now = time.time()
        self._first_step_at = self._first_step_at or now
        self._session_tokens += int(self.data.lengths[self.next_batch().rows].sum())
        self.step += 1
        learning_rate = self._schedule.learning_rates[self.step - 1]
        skipped = not math.isfinite(grad_norm)  # adamw.update skips such a step
        if self.guard.check_step(
            self.step, loss=loss, grad_norm=grad_norm, learning_rate=learning_rate, skipped=skipped
        ):
            self._log_metrics({SKIPPED_STEPS: float(self.guard.skipped_steps)})
        self._losses.append(loss)
        if now - self._last_progress > 0.5 or self.ended:
            self._last_progress = now
            self.emit("progress", done=self.step, total=self.batching.steps, unit="steps")
        if self._should_log:
            mean = sum(self._losses) / len(self._losses)
            self._losses = []
            metrics = {"loss": mean, "grad_norm": grad_norm, "learning_rate": learning_rate}
            self._log_metrics({name: value for name, value in metrics.items() if math.isfinite(value)})

    @property
    def should_evaluate(self) -> bool:
        return self.step in self._evaluate_at

    def record_evaluation(self, loss: float) -> None:
        """Record an evaluation: `loss` in nats per loss token of `eval_data`. Raises StageError if it is not finite.

        The evaluation of the last step is reported with the artifact (search/trial.py): a scheduler may stop a trial at
        any report, and a finished model must not be lost.
        """
        check_finite(
            self.job.stage, self.step, learning_rate=self._schedule.learning_rates[self.step - 1], eval_loss=loss
        )
        self._log_metrics({"eval_loss": loss})
        if not self.ended:
            self._queue_report(self.step, {"eval_loss": loss})

    def _queue_report(self, step: int, metrics: Mapping[str, float]) -> None:
        rows = step * self._size
        tokens = int(self.data.lengths[self._order[:rows]].sum())
        self._pending_reports.append(report_of(self.job.stage, step, self.batching.steps, tokens, rows, metrics))

    def report(self, report: Report) -> None:
        """Report the pending evaluations."""
        pending, self._pending_reports = self._pending_reports, []
        for metrics in pending:
            report(metrics)

    @property
    def is_saved(self) -> bool:
        """Whether this step has a checkpoint. It is never rewritten: other trials may have been seeded from it."""
        return self.step == self._saved_at

    @property
    def should_save(self) -> bool:
        """Only at logged steps, so that a resumed run logs the same mean losses."""
        due = self.step - self._saved_at >= self._save_period and self._should_log
        return ((due and not self.guard.last_was_skipped) or self._keep_checkpoint) and not self.ended

    @property
    def _keep_checkpoint(self) -> bool:
        return self.job.checkpoint_dir is not None and self.should_evaluate

    @property
    def _should_log(self) -> bool:
        return self.step % self._log_period == 0 or self.step == 1

    def save(self) -> None:
        """Write a complete checkpoint; if due, copy it to `job.checkpoint_dir`. Call Stack.sync_to_adapters before."""
        self._check_weights()
        folder = self._checkpoints / f"checkpoint-{self.step}"
        folder.mkdir(parents=True, exist_ok=True)
        adapter = self.adapter
        state = {
            "weights": adapter.weights,
            "first": adapter.exp_avg,
            "second": adapter.exp_avg_sq,
            "losses": self._losses,
        }
        torch.save(state, folder / STATE)
        write_history(folder, self.history)
        mark_complete(self._checkpoints, self.step, CHECKPOINT_SIGNATURE)
        if self.job.checkpoint_dir is not None and self._keep_checkpoint:
            hardlink_copy(folder, self.job.checkpoint_dir)
        self._saved_at = self.step

    def _load_checkpoint(self) -> int:
        """Load the newest checkpoint, if any; return its step."""
        checkpoint = last_checkpoint(self._checkpoints, CHECKPOINT_SIGNATURE)
        if checkpoint is None:
            return 0
        state = torch.load(checkpoint / STATE, weights_only=True)
        adapter = self.adapter
        for name, matrices in (
            ("weights", adapter.weights),
            ("first", adapter.exp_avg),
            ("second", adapter.exp_avg_sq),
        ):
            for layer, pair in state[name].items():
                for matrix, saved in zip(matrices[layer], pair, strict=True):
                    matrix.copy_(saved)
        self.history = read_history(checkpoint)
        self.guard.resume(self.history)
        if self.job.resume_from is not None and checkpoint.name == self.job.resume_from.name:
            relog_history(self.history, self.emit)
        for step, metrics in evaluations_of(self.history):
            self._queue_report(step, metrics)
        self._losses = list(state["losses"])
        self.step = step_of(checkpoint)
        return self.step

    def finish(self, losses: Sequence[float], pack_stats: dict[str, Any]) -> None:
        """Write the artifact, the same as that of a training of its own. Call Stack.sync_to_adapters first.

        `losses`: of the sequences of `probe`. Raises StageError if the training has diverged, or if the saved adapter
        is not the trained one.
        """
        self.guard.check_end()
        self._check_weights()
        job = self.job
        folder = job.out / "adapter"
        self._peft_model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        write_base(job.out, job.model)
        reload_check = check_saved(job, 0, pack_stats["dtype"], self._base_parameters, losses, self.probe.saved)
        trainable = sum(matrix.numel() for pair in self.adapter.weights.values() for matrix in pair)
        facts = {
            **self.data.facts(),
            "train_on": self.spec.train_on,
            "truncate": self.spec.truncate,
            "eval_rows": self.eval_data.stats.rows,
            "tokens": int(self.data.lengths[self._order].sum()),
            **mixture_facts(self.spec, self.data, self._order),
            **training_facts(self.spec, self.batching, self.history, self._base_parameters + trainable, trainable),
        }
        seconds = time.time() - self._started_at
        runtime_stats = {
            "train_seconds": seconds,
            "tokens_per_second": self._session_tokens / seconds,
            "first_step_seconds": (self._first_step_at or time.time()) - job.started,
            "resumed_from": self.resumed_from,
            "workers": 1,
            **pack_stats,
            **reload_check,
        }
        (job.out / HISTORY).write_text("".join(json.dumps(point) + "\n" for point in self.history))
        (job.work / "outcome.json").write_text(json.dumps({"facts": facts, "runtime_stats": runtime_stats}))

    def _check_weights(self) -> None:
        self.guard.check_weights(self.step, self._peft_model.named_parameters())

    def emit(self, event: str, **values: Any) -> None:
        self._log.write(event, **values)

    def _log_metrics(self, values: dict[str, float]) -> None:
        values["rows"] = float(self.step * self._size)
        self.history.append({"step": float(self.step), **values})
        self.emit("metrics", step=self.step, values=values)

    @property
    def _size(self) -> int:
        return self.batching.global_batch_size

    @property
    def _checkpoints(self) -> Path:
        return self.job.work / "checkpoints"


def group_by_eval_data(members: Sequence[Member]) -> dict[int, list[Member]]:
    """Group members that have the same evaluation data, so that one batch evaluates all of them."""
    groups: dict[int, list[Member]] = {}
    for member in members:
        groups.setdefault(id(member.eval_data), []).append(member)
    return groups
