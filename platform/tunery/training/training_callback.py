"""The TrainerCallback that applies the decisions of LoopControl to transformers' Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tunery.training.collectives import mean_over_ranks
from tunery.training.divergence import step_result
from tunery.training.loop_control import LoopControl
from tunery.training.schedule import Schedule

LOGGED_METRICS = ("loss", "learning_rate", "grad_norm")
"""Logged for all trainers."""


class TrainingCallback(TrainerCallback):  # type: ignore[misc]
    """Sets learning rate and weight decay of each step and checks its loss. LoopControl decides when to log, evaluate,
    save and stop."""

    def __init__(self, loop: LoopControl, schedule: Schedule, extra_metrics: Sequence[str] = ()) -> None:
        """extra_metrics: metrics to log besides LOGGED_METRICS, under the trainer's names."""
        self._loop, self._schedule = loop, schedule
        self._metrics = {*LOGGED_METRICS, *extra_metrics}
        self._trainer: Any = None
        self._loss: torch.Tensor | float = 0.0
        """Loss of this rank, summed over the micro batches of the current step. transformers scales each so that the
        sum is the loss of the step."""
        self._learning_rate = 0.0
        """Learning rate of the current step."""

    def attach(self, trainer: Any) -> None:
        """Wrap `trainer.training_step` to record the loss of every micro batch, which transformers (5.23) does not pass
        to callbacks. Call before training."""
        self._trainer, training_step = trainer, trainer.training_step

        def record_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
            loss: torch.Tensor = training_step(*args, **kwargs)
            self._loss = self._loss + loss.detach()
            return loss

        trainer.training_step = record_loss

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._learning_rate = self._schedule.learning_rates[state.global_step]
        groups = kwargs["optimizer"].param_groups
        for group in groups:
            group["lr"] = self._learning_rate
        # transformers has two groups. The second one holds the parameters without weight decay: biases and norms.
        groups[0]["weight_decay"] = self._schedule.weight_decays[state.global_step]

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        loop = self._loop
        loop.end_step(state.global_step)
        loss, self._loss = mean_over_ranks(float(self._loss)), 0.0
        grad_norm, skipped = step_result(self._trainer.model_wrapped)
        loop.check_step(loss=loss, grad_norm=grad_norm, learning_rate=self._learning_rate, skipped=skipped)
        loop.raise_if_stopped()
        control.should_log, control.should_evaluate = loop.should_log, loop.should_evaluate
        if loop.should_save:
            loop.check_weights(self._trainer.model.named_parameters())
            control.should_save = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        metrics = {name: value for name, value in (logs or {}).items() if name in self._metrics}
        if "learning_rate" in metrics:  # transformers logs the constant learning rate of its own scheduler
            metrics["learning_rate"] = self._learning_rate
        self._loop.log(metrics)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._loop.record_evaluation(metrics or {}, self._learning_rate)
        if not control.should_save:
            self._loop.flush_reports()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._loop.complete_checkpoint()
        self._loop.flush_reports()
