"""Evaluation of TRL trainers with results that do not depend on the number of workers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerControl

from tunery.models.tokenized_dataset import Integers
from tunery.training.batches import evaluation_batches


class DistributedEval:
    """Mixin for TRL trainers: gather the results of all rows before averaging them."""

    model: Any
    accelerator: Any
    args: Any
    eval_dataset: Any
    callback_handler: Any
    state: Any
    control: TrainerControl
    last_eval_metrics: Mapping[str, float] = {}

    def evaluate_rows(
        self,
        lengths: Sequence[int] | Integers,
        columns: int,
        evaluate_batch: Callable[[list[int]], torch.Tensor],
        size: int,
    ) -> torch.Tensor:
        """Return the results of all rows from all ranks, (rows, columns) float64.

        `evaluate_batch` returns (batch, columns) for a batch of at most `size` row indices of similar length. Leaves
        the model in evaluation mode, until `report_metrics`.
        """
        results = torch.zeros(len(lengths), columns, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for batch, is_counted in evaluation_batches(lengths, size, dist.get_rank(), dist.get_world_size()):
            with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
                values = evaluate_batch(batch)
            if is_counted:
                results[batch] = values.to(results)
        dist.all_reduce(results)
        return results

    def report_metrics(self, metrics: dict[str, float]) -> dict[str, float]:
        """Log the metrics of an evaluation, and pass them to the callbacks."""
        self.last_eval_metrics = dict(metrics)
        self.log(metrics)  # type: ignore[attr-defined]  # in evaluation mode: in training mode TRL would add its running means
        self.model.train()
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: the manifest has more information, and a card would go into every checkpoint."""
