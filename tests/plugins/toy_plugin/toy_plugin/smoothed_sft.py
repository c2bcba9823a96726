"""SFT with a label-smoothing loss (Szegedy et al. 2016, https://arxiv.org/abs/1512.00567, section 7)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from tunery.models.tokenized_dataset import Integers
from tunery.training.job import Job
from tunery.training.sft import SftTask, SftTrainer


class SmoothedSftTask(SftTask):
    def __init__(self, job: Job, rank: int) -> None:
        super().__init__(job, rank)
        self._smoothing = job.spec.smoothing

    def build_trainer(self, arguments: dict[str, Any], order: Integers, callback: TrainerCallback) -> SftTrainer:
        trainer = super().build_trainer(arguments, order, callback)
        trainer.compute_loss_func = partial(smoothed_loss, smoothing=self._smoothing)
        return trainer

    def final_metrics(self, trainer: SftTrainer) -> dict[str, Any]:
        return {"smoothing": self._smoothing}


def smoothed_loss(
    outputs: Mapping[str, torch.Tensor], labels_bt: torch.Tensor, num_items_in_batch: Any, *, smoothing: float
) -> torch.Tensor:
    """Return the mean cross-entropy with (1 - smoothing) x the label + smoothing x the uniform distribution."""
    log_probs = outputs["logits"][:, :-1].float().log_softmax(-1)
    labels = labels_bt[:, 1:]
    mask = labels != -100
    of_label = log_probs.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    losses = -(1 - smoothing) * of_label - smoothing * log_probs.mean(-1)
    return (losses * mask).sum() / num_items_in_batch
