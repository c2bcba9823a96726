"""What the trainers that hold a model to a reference have in common: answers as batches, their log-probabilities under
model and reference, and our data order.

The reference is the model that training began with: under an adapter the base without it, else a second copy, which
ZeRO-3 shards like the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from tunery.models.tokenized_dataset import Integers
from tunery.training.distributed_eval import DistributedEval

SETTINGS = {"max_length": None, "disable_dropout": False, "remove_unused_columns": False}
"""For TRL's configurations: rows come as tokens, cut already, and the model's own dropout is off
(training/policy.py)."""


def indices(order: Sequence[int] | Integers) -> Dataset:
    """What a trainer of TRL takes for its rows: their tokens stay where they are until a batch is collated."""
    return Dataset.from_dict({"index": order})


def padded(sequences: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    """Of (ids, labels): input_ids, attention_mask and labels, (sequences, longest) in int64, padded on the right; a
    label is -100 where no loss counts."""
    longest = max(len(ids) for ids, _ in sequences)
    gaps = [longest - len(ids) for ids, _ in sequences]
    columns = {
        "input_ids": [ids + [pad] * gap for (ids, _), gap in zip(sequences, gaps, strict=True)],
        "attention_mask": [[1] * len(ids) + [0] * gap for (ids, _), gap in zip(sequences, gaps, strict=True)],
        "labels": [labels + [-100] * gap for (_, labels), gap in zip(sequences, gaps, strict=True)],
    }
    return {name: torch.tensor(rows) for name, rows in columns.items()}


class ReferenceLogProbs(DistributedEval):
    """For a TRL trainer with `model`, `ref_model` and a fused head (DPOTrainer, KTOTrainer; TRL 1.16)."""

    ref_model: Any
    train_dataset: Any
    reference_free = False

    def log_ratios(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """(sequences,) float32, nats: of each answer log p under the model, less log p under the reference."""
        own = response_log_probs(model, batch)
        if self.reference_free:
            return own
        alone: AbstractContextManager[Any] = nullcontext()
        if self.ref_model is None:
            alone = use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None)
        checkpointing = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing), alone:
            reference = response_log_probs(self.ref_model or self.model, batch)
        return own - reference

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def _prepare_dataset(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Rows are tokens already, cut where every training here cuts them (models/truncation.py)."""
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Asked for only so that no second copy is loaded where nobody looks at it."""
        return dataset


def response_log_probs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(sequences,) float32, nats: the sum over the answer's tokens, through TRL's fused head."""
    asked = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    found: torch.Tensor = model(**asked, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)
    return found
