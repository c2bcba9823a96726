"""A member of a pack: one training, with its progress, next batch, checkpoints and artifact."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tunery.errors import StageError
from tunery.models.load import write_base
from tunery.spec import Sft
from tunery.training.batches import data_order, plan_training
from tunery.training.job import Job, Report, event_emitter
from tunery.training.loop_control import LoopControl
from tunery.training.packed.weightless_base import adapter_of
from tunery.training.reload_check import NUM_PROBE_CANDIDATES, LanguageProbe, check_saved
from tunery.training.schedule import build_schedule
from tunery.training.sequences import TrainingSequences, mixture_facts, mixture_of
from tunery.training.training_stats import logging_steps, save_steps, training_facts

CHECKPOINT_SIGNATURE = "a pack"
"""Signature of a member's checkpoints, which any pack can load, but not DeepSpeed."""
STATE = "state.pt"
"""File in a checkpoint with the adapter's weights and AdamW moments, and the losses since the last log."""


@dataclass(frozen=True)
class MemberBatch:
    """The batch and hyperparameters of one member for one step."""

    indices: list[int]
    """Indices of the batch's sequences, by descending length."""
    learning_rate: float
    weight_decay: float
    step: int
    """Number of the step, from 1."""


class Member:
    """A training in a pack. The constructor resumes it from its last checkpoint."""

    def __init__(
        self,
        job: Job,
        data: TrainingSequences,
        eval_data: TrainingSequences,
        tokenizer: Any,
        peft_model: Any,
        base_parameters: int,
        report: Report,
    ) -> None:
        """peft_model: the adapter on a weightless base (weightless_base.py, `with_adapter`); base_parameters: number of
        parameters of the base."""
        assert isinstance(job.spec, Sft)
        self.job, self.data, self.eval_data = job, data, eval_data
        self.spec: Sft = job.spec
        self._tokenizer, self._peft_model, self._base_parameters = tokenizer, peft_model, base_parameters
        self._batching = plan_training(job.spec, len(data), 1, "auto")
        self._batch_size, steps = self._batching.global_batch_size, self._batching.steps
        self._order = data_order(data.lengths, steps, self._batch_size, job.seed, mixture_of(job.spec, data))
        self._schedule = build_schedule(job.spec, steps)
        self.adapter = adapter_of(peft_model)
        self.error: StageError | None = None
        """The error that ended this training; the other members continue."""
        self._losses: list[float] = []
        """Losses of the steps since the last log."""
        self._started_at = time.time()
        self._tokens_since_start = 0
        """Tokens trained on since this object was constructed, without those before a resumed step."""
        self.probe = LanguageProbe(job, data.first(NUM_PROBE_CANDIDATES), base_parameters)
        self.loop = LoopControl(
            job,
            steps,
            event_emitter(job, 0),
            has_eval_data=len(eval_data) > 0,
            logging_steps=logging_steps(steps),
            save_steps=save_steps(job.compute, steps),
            signature=CHECKPOINT_SIGNATURE,
            rows_per_step=self._batch_size,
            tokens_at=lambda step: int(data.lengths[self._order[: step * self._batch_size]].sum()),
            report=report,
        )
        if (checkpoint := self.loop.resume()) is not None:
            self._load_state(checkpoint)

    @property
    def ended(self) -> bool:
        """Whether the training has taken its last step or has failed."""
        return self.loop.is_last_step or self.error is not None

    def attempt(self, function: Callable[[], None]) -> None:
        """Call `function` unless this member has failed. A StageError ends this member only."""
        if self.error is None:
            try:
                function()
            except StageError as error:
                self.error = error

    def next_batch(self) -> MemberBatch:
        """Return the batch of the next step."""
        step = self.loop.step
        return MemberBatch(
            self._order[step * self._batch_size : (step + 1) * self._batch_size].tolist(),
            self._schedule.learning_rates[step],
            self._schedule.weight_decays[step],
            step + 1,
        )

    def record_step(self, loss: float, grad_norm: float) -> None:
        """Record a finished step, and log its metrics if due. Raises StageError if the training has diverged.

        loss: in nats per loss token; grad_norm: before clipping.
        """
        batch = self.next_batch()
        self._tokens_since_start += int(self.data.lengths[batch.indices].sum())
        self.loop.end_step(batch.step)
        skipped = not math.isfinite(grad_norm)  # adamw.update skips such a step
        self.loop.check_step(loss=loss, grad_norm=grad_norm, learning_rate=batch.learning_rate, skipped=skipped)
        self._losses.append(loss)
        if self.loop.should_log:
            mean_loss = sum(self._losses) / len(self._losses)
            self._losses = []
            self.loop.log({"loss": mean_loss, "grad_norm": grad_norm, "learning_rate": batch.learning_rate})

    def record_evaluation(self, loss: float) -> None:
        """Record an evaluation. Raises StageError if the loss, in nats per loss token, is not finite."""
        self.loop.record_evaluation({"eval_loss": loss}, self._schedule.learning_rates[self.loop.step - 1])

    def save(self) -> None:
        """Write a complete checkpoint. Call Stack.sync_to_adapters first. Raises StageError if a weight is not
        finite."""
        self.loop.check_weights(self._peft_model.named_parameters())
        self.loop.checkpoint.mkdir(parents=True, exist_ok=True)
        adapter = self.adapter
        state = {
            "weights": adapter.weights,
            "first": adapter.exp_avg,
            "second": adapter.exp_avg_sq,
            "losses": self._losses,
        }
        torch.save(state, self.loop.checkpoint / STATE)
        self.loop.complete_checkpoint()

    def _load_state(self, checkpoint: Path) -> None:
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
        self._losses = list(state["losses"])

    def finish(self, losses: Sequence[float], pack_stats: dict[str, Any]) -> None:
        """Write the artifact, the same as outside a pack. Call Stack.sync_to_adapters first.

        losses: of the sequences of `probe`, under the trained adapter; pack_stats: runtime stats of the pack. Raises
        StageError if the training has diverged, or if the saved adapter is not the trained one.
        """
        self.loop.check_end(self._peft_model.named_parameters())
        job = self.job
        folder = job.out / "adapter"
        self._peft_model.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
        write_base(job.out, job.model)
        reload_check = check_saved(job, 0, pack_stats["dtype"], self._base_parameters, losses, self.probe.saved_outputs)
        trainable = sum(matrix.numel() for pair in self.adapter.weights.values() for matrix in pair)
        facts = {
            **self.data.facts(),
            "train_on": self.spec.train_on,
            "truncate": self.spec.truncate,
            "eval_rows": self.eval_data.stats.rows,
            "tokens": int(self.data.lengths[self._order].sum()),
            **mixture_facts(self.spec, self.data, self._order),
            **training_facts(
                self.spec, self._batching, self.loop.history, self._base_parameters + trainable, trainable
            ),
        }
        train_seconds = time.time() - self._started_at
        runtime_stats = {
            "train_seconds": train_seconds,
            "tokens_per_second": self._tokens_since_start / train_seconds,
            "first_step_seconds": (self.loop.first_step_at or time.time()) - job.started_at,
            "resumed_from": self.loop.resumed_from,
            "workers": 1,
            **pack_stats,
            **reload_check,
        }
        self.loop.write_outcome(facts, runtime_stats)


def group_by_eval_data(members: Sequence[Member]) -> dict[int, list[Member]]:
    """Return groups of members with the same evaluation data, so that one batch can evaluate all of a group."""
    groups: dict[int, list[Member]] = {}
    for member in members:
        groups.setdefault(id(member.eval_data), []).append(member)
    return groups
