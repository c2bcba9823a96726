"""`classifier`: train a binary quality classifier on labelled rows, by transformers' Trainer.

Rows are encoded as in the scorer that will use the model (models/classifier_inputs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from tunery.errors import StageError
from tunery.models.classifier_inputs import NO_LABEL, ClassifierEncoder
from tunery.models.metrics import Floats, Integers, auc, class_weights, cross_entropy, fitted_temperature
from tunery.spec import LABELS, ClassifierTraining
from tunery.spec.trainings import data_refs
from tunery.training.classification_head import HeadProbe, ModelWithHead, logits_of, num_shared_rows
from tunery.training.distributed_eval import FixedOrder, index_dataset
from tunery.training.job import Job
from tunery.training.reload_check import MAX_SEQUENCES
from tunery.training.sequences import SequenceSet


class ClassifierTask:
    """The trainer adapter of `classifier`: a language model with a new head, fully trained or with LoRA."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError if `data` or `eval_data` does not have rows of all labels."""
        assert isinstance(job.spec, ClassifierTraining)
        self._job = job
        self._model = ModelWithHead(job, job.spec.tuner, LABELS, rank)
        self._data, self._eval_data = self._model.sequences()
        for field, sequences in (("data", self._data), ("eval_data", self._eval_data)):
            self._check_labels(sequences, field)
        self.examples = self._data
        balanced = job.spec.balanced
        self._weights = class_weights(self._data.row_labels, len(LABELS)) if balanced else np.ones(len(LABELS))

    def trainer(self, arguments: dict[str, Any], order: Integers, callback: TrainerCallback) -> ClassifierTrainer:
        settings = TrainingArguments(
            **arguments, remove_unused_columns=False, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        return ClassifierTrainer(
            model=self._model.load(),
            args=settings,
            train_dataset=index_dataset(order),
            processing_class=self._model.tokenizer,
            data_collator=lambda rows: self._collate([row["index"] for row in rows]),
            eval_data=self._eval_data,
            callbacks=[callback],
            weights=self._weights,
            encoder=self._model.encoder,
        )

    def save(self, trainer: ClassifierTrainer) -> None:
        self._model.save(trainer)

    def probe(self, parameters: int) -> HeadProbe:
        first = range(min(MAX_SEQUENCES, len(self._data)))
        return self._model.probe([self._data.encoded(index) for index in first], parameters)

    def data_stats(self) -> dict[str, Any]:
        stats, unlabelled = self._data.stats, self._data.stats.unusable[NO_LABEL]
        return {
            "rows": stats.rows,
            "sequences": len(self._data),
            "labels": _label_counts(self._data),
            "unlabelled": unlabelled,
            "truncated": stats.truncated,
            "unusable": stats.num_unusable - unlabelled,
            "eval_rows": self._eval_data.stats.rows,
            "eval_labels": _label_counts(self._eval_data),
            "eval_rows_trained_on": num_shared_rows(self._data, self._eval_data),
        }

    def final_metrics(self, trainer: ClassifierTrainer) -> dict[str, Any]:
        """eval_accuracy, eval_auc: of the last evaluation; temperature: fitted to eval_data, with its loss."""
        if trainer.eval_outputs is None:
            return {"temperature": None}
        temperature = fitted_temperature(*trainer.eval_outputs)
        metrics = trainer.last_eval_metrics
        return {
            "eval_accuracy": metrics["eval_accuracy"],
            "eval_auc": metrics["eval_auc"],
            "temperature": temperature,
            "eval_loss_at_temperature": cross_entropy(*trainer.eval_outputs, temperature),
        }

    def _check_labels(self, sequences: SequenceSet, field: str) -> None:
        counts, stats = _label_counts(sequences), sequences.stats
        if sequences.parts and 0 in counts.values():
            label_counts = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            stages = ", ".join(data_refs(getattr(self._job.spec, field)).values())
            unlabelled = stats.unusable[NO_LABEL]
            raise StageError(
                self._job.stage,
                f"the rows of `{stages}` ({field}) don't have both labels: {label_counts}"
                + (f", {unlabelled:,} without a label" if unlabelled else ""),
                cause="a classifier learns from rows of both labels",
                remedy="give rows of both; or two stages, as {good: STAGE, bad: STAGE}",
            )

    def _collate(self, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the model inputs and `target`, (rows,) int64."""
        inputs = self._model.encoder.tensors([self._data.encoded(index) for index in batch], device="cpu")
        return {**inputs, "target": torch.tensor(self._data.row_labels[batch])}


def _label_counts(sequences: SequenceSet) -> dict[str, int]:
    """Number of rows per label."""
    return {name: int((sequences.row_labels == number).sum()) for number, name in enumerate(LABELS)}


class ClassifierTrainer(FixedOrder, Trainer):  # type: ignore[misc]  # a subclass of what mypy takes for Any
    """Trainer with a fixed data order, a weighted loss and an exact evaluation."""

    def __init__(
        self, *, weights: Floats, encoder: ClassifierEncoder, eval_data: SequenceSet, **arguments: Any
    ) -> None:
        """weights: loss weight of each label, (labels,)."""
        super().__init__(**arguments)
        self._weights, self._encoder, self._eval_data = weights, encoder, eval_data
        self.eval_outputs: tuple[Floats, Integers, Floats] | None = None
        """Of the last evaluation: logits (rows, labels), labels (rows,), weights (rows,)."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Weighted loss, averaged over rows and not weights, so that it does not depend on the micro batch size."""
        target = inputs.pop("target")
        outputs = model(**inputs)
        losses = torch.nn.functional.cross_entropy(outputs.logits.float(), target, reduction="none")
        loss = (losses * torch.as_tensor(self._weights, dtype=torch.float32, device=losses.device)[target]).mean()
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the complete set: eval_loss (nats per row, weighted as in training), eval_accuracy, eval_auc."""
        logits = logits_of(self, self._encoder, self._eval_data.lengths, self._eval_data.encoded)
        labels = self._eval_data.row_labels
        self.eval_outputs = logits, labels, self._weights[labels]
        area = auc(logits[:, 0] - logits[:, 1], labels == 0)
        assert area is not None, "eval_data has both labels"
        metrics = {
            "eval_loss": cross_entropy(*self.eval_outputs),
            "eval_accuracy": float((logits.argmax(axis=1) == labels).mean()),
            "eval_auc": area,
        }
        return self.report_metrics(metrics)
