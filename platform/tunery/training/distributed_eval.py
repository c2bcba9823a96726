"""Evaluations of TRL's trainers that give the same numbers on any number of workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerControl

from tunery.models.tokenized_dataset import Integers
from tunery.training.batches import evaluation_batches


class DistributedEval:
    """Beside a trainer of TRL: what is measured of each row is put together, and only then averaged."""

    model: Any
    accelerator: Any
    args: Any
    eval_dataset: Any
    callback_handler: Any
    state: Any
    control: TrainerControl
    metrics_at_end: Mapping[str, float] = {}
    """Of the last evaluation."""

    def measured(
        self, lengths: Sequence[int] | Integers, columns: int, measure: Callable[[list[int]], torch.Tensor], size: int
    ) -> torch.Tensor:
        """(rows, columns) float64: what `measure` gives, (batch, columns), for batches of `size` rows of like length,
        from all ranks. It leaves the model in evaluation mode; `told` ends that."""
        found = torch.zeros(len(lengths), columns, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for batch, counts in evaluation_batches(lengths, size, dist.get_rank(), dist.get_world_size()):
            with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
                values = measure(batch)
            if counts:
                found[batch] = values.to(found)
        dist.all_reduce(found)
        return found

    def told(self, metrics: dict[str, float]) -> dict[str, float]:
        """Of an evaluation, to the log and the callbacks."""
        self.metrics_at_end = dict(metrics)
        self.log(metrics)  # type: ignore[attr-defined]  # in evaluation mode: else it takes training's running means
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The manifest tells more, and a card would be written anew into every checkpoint."""
