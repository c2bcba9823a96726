"""`classifier`: train a binary quality classifier on labelled rows, by transformers' Trainer.

Rows are encoded by the same function as when the model scores rows (models/classifier_inputs.py).
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
from tunery.training.classification_head import HeadProbe, ModelWithHead, compute_logits, num_shared_rows
from tunery.training.distributed_eval import FixedOrderMixin, index_dataset
from tunery.training.job import Job
from tunery.training.reload_check import MAX_SEQUENCES
from tunery.training.sequences import SequenceSet


class ClassifierTask:
    """The training task of `classifier`: a language model with a new head."""

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
        self._label_weights = class_weights(self._data.row_labels, len(LABELS)) if balanced else np.ones(len(LABELS))

    def build_trainer(self, arguments: dict[str, Any], order: Integers, callback: TrainerCallback) -> ClassifierTrainer:
        training_arguments = TrainingArguments(
            **arguments, remove_unused_columns=False, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        return ClassifierTrainer(
            model=self._model.load(),
            args=training_arguments,
            train_dataset=index_dataset(order),
            processing_class=self._model.tokenizer,
            data_collator=lambda rows: self._collate([row["index"] for row in rows]),
            eval_data=self._eval_data,
            callbacks=[callback],
            label_weights=self._label_weights,
            encoder=self._model.encoder,
        )

    def save(self, trainer: ClassifierTrainer) -> None:
        self._model.save(trainer)

    def probe(self, num_parameters: int) -> HeadProbe:
        first = range(min(MAX_SEQUENCES, len(self._data)))
        return self._model.probe([self._data.encoded(index) for index in first], num_parameters)

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
        """Return eval_accuracy and eval_auc of the last evaluation, the temperature fitted to `eval_data`, and the loss
        at that temperature."""
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
        """Raise StageError if a label has no row."""
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
        """Return the model inputs of a batch, and `target`, (rows,) int64: index of the label."""
        inputs = self._model.encoder.tensors([self._data.encoded(index) for index in batch], device="cpu")
        return {**inputs, "target": torch.tensor(self._data.row_labels[batch])}


def _label_counts(sequences: SequenceSet) -> dict[str, int]:
    """Return the number of rows of each label."""
    return {name: int((sequences.row_labels == number).sum()) for number, name in enumerate(LABELS)}


class ClassifierTrainer(FixedOrderMixin, Trainer):  # type: ignore[misc]  # a subclass of what mypy takes for Any
    """Trainer with a fixed data order, a weighted loss and an exact evaluation."""

    def __init__(
        self, *, label_weights: Floats, encoder: ClassifierEncoder, eval_data: SequenceSet, **arguments: Any
    ) -> None:
        """label_weights: weight of the loss of each label, (labels,)."""
        super().__init__(**arguments)
        self._label_weights, self._encoder, self._eval_data = label_weights, encoder, eval_data
        self.eval_outputs: tuple[Floats, Integers, Floats] | None = None
        """Logits (rows, labels), labels (rows,) and loss weights (rows,) of the last evaluation."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the weighted loss, divided by the number of rows and not by the sum of their weights, so that it does
        not depend on the micro batch size."""
        target = inputs.pop("target")
        outputs = model(**inputs)
        losses = torch.nn.functional.cross_entropy(outputs.logits.float(), target, reduction="none")
        weights = torch.as_tensor(self._label_weights, dtype=torch.float32, device=losses.device)[target]
        loss = (losses * weights).mean()
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return eval_loss (in nats per row, weighted as in training), eval_accuracy and eval_auc of the complete
        evaluation set."""
        logits = compute_logits(self, self._encoder, self._eval_data.lengths, self._eval_data.encoded)
        labels = self._eval_data.row_labels
        self.eval_outputs = logits, labels, self._label_weights[labels]
        eval_auc = auc(logits[:, 0] - logits[:, 1], labels == 0)
        assert eval_auc is not None, "eval_data has both labels"
        metrics = {
            "eval_loss": cross_entropy(*self.eval_outputs),
            "eval_accuracy": float((logits.argmax(axis=1) == labels).mean()),
            "eval_auc": eval_auc,
        }
        return self.report_metrics(metrics)
