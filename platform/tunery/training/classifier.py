"""What `classifier` learns: to tell good rows from bad ones, by transformers' Trainer, from labelled rows.

A row is shown to the model as to the scorer that will use it (models/classifier_inputs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from tunery.errors import StageError
from tunery.models.classifier_inputs import NO_LABEL, ClassifierEncoder
from tunery.models.metrics import Floats, Integers, auc, class_weights, cross_entropy, fitted_temperature
from tunery.spec import LABELS, ClassifierTraining
from tunery.spec.trainings import data_refs
from tunery.training.classification_head import HeadProbe, ModelWithHead, logits_of, rows_in_both
from tunery.training.job import Job
from tunery.training.reference_log_probs import indices
from tunery.training.reload_check import MAX_SEQUENCES
from tunery.training.sequences import SequenceSet


class ClassifierTask:
    """A new head on a language model, trained with it or beside an adapter."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError when not all labels are among the rows, or among those of eval_data."""
        assert isinstance(job.spec, ClassifierTraining)
        self._job = job
        self._headed = ModelWithHead(job, job.spec.tuner, LABELS, rank)
        self._data, self._evaluated = self._headed.sequences()
        for field, sequences in (("data", self._data), ("eval_data", self._evaluated)):
            self._check_labels(sequences, field)
        self.examples = self._data
        balanced = job.spec.balanced
        self._weights = class_weights(self._data.row_labels, len(LABELS)) if balanced else np.ones(len(LABELS))

    def trainer(self, arguments: dict[str, Any], order: Integers, steps: TrainerCallback) -> ClassifierTrainer:
        settings = TrainingArguments(
            **arguments, remove_unused_columns=False, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        return ClassifierTrainer(
            model=self._headed.load(),
            args=settings,
            train_dataset=indices(order),
            processing_class=self._headed.tokenizer,
            data_collator=lambda rows: self._collate([row["index"] for row in rows]),
            evaluated=self._evaluated,
            callbacks=[steps],
            weights=self._weights,
            read=self._headed.read,
        )

    def save(self, trainer: ClassifierTrainer) -> None:
        self._headed.save(trainer)

    def probe(self, parameters: int) -> HeadProbe:
        first = range(min(MAX_SEQUENCES, len(self._data)))
        return self._headed.probe([self._data.encoded(index) for index in first], parameters)

    def counted(self) -> dict[str, Any]:
        stats, unlabelled = self._data.stats, self._data.stats.unusable[NO_LABEL]
        return {
            "rows": stats.rows,
            "sequences": len(self._data),
            "labels": _counts(self._data),
            "unlabelled": unlabelled,
            "truncated": stats.truncated,
            "unusable": stats.num_unusable - unlabelled,
            "eval_rows": self._evaluated.stats.rows,
            "eval_labels": _counts(self._evaluated),
            "eval_rows_trained_on": rows_in_both(self._data, self._evaluated),
        }

    def found(self, trainer: ClassifierTrainer) -> dict[str, Any]:
        """eval_accuracy, eval_auc: at the end; temperature: the one that fits eval_data best, and the loss by it."""
        if trainer.measured is None:
            return {"temperature": None}
        temperature = fitted_temperature(*trainer.measured)
        last = trainer.metrics_at_end
        return {
            "eval_accuracy": last["eval_accuracy"],
            "eval_auc": last["eval_auc"],
            "temperature": temperature,
            "eval_loss_at_temperature": cross_entropy(*trainer.measured, temperature),
        }

    def _check_labels(self, sequences: SequenceSet, field: str) -> None:
        counts, stats = _counts(sequences), sequences.stats
        if sequences.parts and 0 in counts.values():
            found = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            stages = ", ".join(data_refs(getattr(self._job.spec, field)).values())
            unlabelled = stats.unusable[NO_LABEL]
            raise StageError(
                self._job.stage,
                f"the rows of `{stages}` ({field}) don't have both labels: {found}"
                + (f", {unlabelled:,} without a label" if unlabelled else ""),
                cause="a classifier learns from rows of both labels",
                remedy="give rows of both; or two stages, as {good: STAGE, bad: STAGE}",
            )

    def _collate(self, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """What the model takes, and target, (rows,) in int64."""
        inputs = self._headed.read.tensors([self._data.encoded(index) for index in batch], device="cpu")
        return {**inputs, "target": torch.tensor(self._data.row_labels[batch])}


def _counts(sequences: SequenceSet) -> dict[str, int]:
    """Rows by label."""
    return {name: int((sequences.row_labels == number).sum()) for number, name in enumerate(LABELS)}


class ClassifierTrainer(Trainer):  # type: ignore[misc]  # a subclass of what mypy takes for Any
    """With our data order, a weighted loss, and an exact evaluation."""

    def __init__(self, *, weights: Floats, read: ClassifierEncoder, evaluated: SequenceSet, **arguments: Any) -> None:
        """weights: (labels,), of a row's loss by its label."""
        super().__init__(**arguments)
        self._weights, self._read, self._evaluated = weights, read, evaluated
        self.measured: tuple[Floats, Integers, Floats] | None = None
        """Of the last evaluation: logits (rows, labels), labels (rows,), weights (rows,)."""
        self.metrics_at_end: dict[str, float] = {}

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over rows, not over weights: so micro batches and workers add up to the same, however cut."""
        target = inputs.pop("target")
        outputs = model(**inputs)
        losses = torch.nn.functional.cross_entropy(outputs.logits.float(), target, reduction="none")
        loss = (losses * torch.as_tensor(self._weights, dtype=torch.float32, device=losses.device)[target]).mean()
        return (loss, outputs) if return_outputs else loss

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """eval_loss (nats a row, weighted as in training), eval_accuracy, eval_auc of the whole set: the logits of all
        ranks are put together."""
        found = logits_of(self, self._read, self._evaluated.lengths, self._evaluated.encoded)
        labels = self._evaluated.row_labels
        self.measured = found, labels, self._weights[labels]
        area = auc(found[:, 0] - found[:, 1], labels == 0)
        assert area is not None, "both labels are there"
        metrics = {
            "eval_loss": cross_entropy(*self.measured),
            "eval_accuracy": float((found.argmax(axis=1) == labels).mean()),
            "eval_auc": area,
        }
        self.metrics_at_end = metrics
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
