"""Data order, batches and evaluation of the trainers that build on transformers' Trainer. Neither order nor evaluation
depends on the number of workers or on the micro batch size."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerControl

from tunery.models.tokenized_dataset import Integers
from tunery.training.batches import evaluation_batches


class DistributedEvalMixin:
    """Mixin for transformers' and TRL's trainers: an evaluation that gathers the results of all rows before it averages
    them."""

    model: Any
    accelerator: Any
    args: Any
    eval_dataset: Any
    callback_handler: Any
    state: Any
    control: TrainerControl
    last_eval_metrics: Mapping[str, float] = {}
    """Metrics of the last evaluation; empty before the first."""

    def evaluate_rows(
        self,
        lengths: Sequence[int] | Integers,
        num_columns: int,
        evaluate_batch: Callable[[list[int]], torch.Tensor],
        batch_size: int | None = None,
    ) -> torch.Tensor:
        """Return the results of all rows from all ranks, (rows, num_columns) float64. Call on all ranks.

        lengths: number of tokens of each row. evaluate_batch: takes at most `batch_size` row indices (default: the
        evaluation batch size of the TrainingArguments) of similar length, and returns (batch size, num_columns).
        """
        batch_size = batch_size or int(self.args.per_device_eval_batch_size)
        results = torch.zeros(len(lengths), num_columns, dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for batch, is_padding in evaluation_batches(lengths, batch_size, dist.get_rank(), dist.get_world_size()):
            with torch.no_grad(), self.compute_loss_context_manager():  # type: ignore[attr-defined]
                batch_results = evaluate_batch(batch)
            if not is_padding:
                results[batch] = batch_results.to(results)
        dist.all_reduce(results)
        self.model.train()
        return results

    def report_metrics(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Pass the metrics of an evaluation to TrainingCallback, which logs and reports them; return them."""
        self.last_eval_metrics = dict(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, dict(metrics))
        return dict(metrics)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no model card: the manifest contains more, and transformers would write a card into every
        checkpoint."""


class FixedOrderMixin(DistributedEvalMixin):
    """Mixin for trainers whose training dataset consists of row indices in training order (training/batches.py)."""

    train_dataset: Any

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the dataset unchanged: rows are already tokenized and truncated, and the data collator reads their
        tokens."""
        return dataset


def index_dataset(order: Sequence[int] | Integers) -> Dataset:
    """Return a dataset of row indices in training order. The data collator reads the tokens of a batch."""
    return Dataset.from_dict({"index": order})


def pad_batch(sequences: Sequence[tuple[list[int], list[int]]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Return input_ids, attention_mask and labels from pairs (ids, labels).

    Each is (sequences, max length) int64, padded on the right. Labels are -100 on padding and for tokens without a
    loss.
    """
    max_length = max(len(ids) for ids, _ in sequences)
    padding = [max_length - len(ids) for ids, _ in sequences]
    columns = {
        "input_ids": [ids + [pad_token_id] * count for (ids, _), count in zip(sequences, padding, strict=True)],
        "attention_mask": [[1] * len(ids) + [0] * count for (ids, _), count in zip(sequences, padding, strict=True)],
        "labels": [labels + [-100] * count for (_, labels), count in zip(sequences, padding, strict=True)],
    }
    return {name: torch.tensor(rows) for name, rows in columns.items()}
