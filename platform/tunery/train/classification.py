"""What `classifier` learns: to tell good rows from bad ones, by transformers' Trainer, from labelled rows.

A row is shown to the model as to the scorer that will use it (models/shown.py). The tokens of all labelled rows are in
the memory of every worker: 100,000 rows of 300 tokens are about 0.6 GB.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments

from tunery.errors import StageError
from tunery.models.metrics import Floats, Integers, auc, class_weights, cross_entropy, fitted_temperature
from tunery.models.shown import RowReader, Seen
from tunery.spec import LABELS, ClassifierTraining
from tunery.store.rows import CONTENT, Row
from tunery.train.headed import HeadedModel, HeadProbe, logits_of
from tunery.train.job import Job, Rows, rows_of
from tunery.train.sequences import check_unusable

COLUMNS = [*CONTENT, "id", "label"]
"""Not `planted`: only judges read it."""
Example = tuple[Seen, int]
"""What is seen of a row, and the number of its label."""


@dataclass
class Examples:
    """Labelled rows."""

    seen: list[Seen] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    rows: int = 0
    unlabelled: int = 0
    unusable: int = 0
    """Rows in which the model sees no token."""

    @property
    def counts(self) -> dict[str, int]:
        return {name: self.labels.count(number) for number, name in enumerate(LABELS)}


class Classification:
    """A new head on a language model, trained with it or beside an adapter."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError when not all labels are among the rows, or among those of eval_data."""
        assert isinstance(job.spec, ClassifierTraining)
        self._job = job
        self._headed = HeadedModel(job, job.spec.tuner, LABELS, rank)
        self._data = self._examples(job.rows, "data")
        self._measured = self._examples(job.eval_rows, "eval_data") if job.eval_rows else Examples()
        self.lengths = [len(seen.ids) for seen in self._data.seen]
        self.part_sizes = [len(self.lengths)]
        labels = np.array(self._data.labels, np.int64)
        self._weights = class_weights(labels, len(LABELS)) if job.spec.balanced else np.ones(len(LABELS))

    def trainer(self, arguments: dict[str, Any], order: Integers, steps: TrainerCallback) -> ClassifierTrainer:
        settings = TrainingArguments(
            **arguments, remove_unused_columns=False, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        examples = list(zip(self._data.seen, self._data.labels, strict=True))
        return ClassifierTrainer(
            model=self._headed.load(),
            args=settings,
            train_dataset=[examples[index] for index in order],
            eval_dataset=list(zip(self._measured.seen, self._measured.labels, strict=True)),
            processing_class=self._headed.tokenizer,
            data_collator=self._collate,
            callbacks=[steps],
            weights=self._weights,
            read=self._headed.read,
        )

    def save(self, trainer: ClassifierTrainer) -> None:
        self._headed.save(trainer)

    def probe(self, parameters: int) -> HeadProbe:
        return self._headed.probe(self._data.seen, parameters)

    def counted(self) -> dict[str, Any]:
        data, measured = self._data, self._measured
        return {
            "rows": data.rows,
            "sequences": len(data.seen),
            "labels": data.counts,
            "unlabelled": data.unlabelled,
            "truncated": sum(seen.truncated for seen in data.seen),
            "unusable": data.unusable,
            "eval_rows": measured.rows,
            "eval_labels": measured.counts,
            "eval_rows_trained_on": len(measured.ids & data.ids),
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

    def _examples(self, sources: Sequence[Rows], named: str) -> Examples:
        examples = Examples()
        pending: list[Row] = []
        for row in rows_of(sources, COLUMNS):
            examples.rows += 1
            if row["label"] is None:
                examples.unlabelled += 1
                continue
            pending.append(row)
            if len(pending) == 1000:
                self._take(pending, examples)
                pending = []
        self._take(pending, examples)
        check_unusable(self._job, named, examples.rows, Counter({"the model reads no token": examples.unusable}))
        if 0 in (counts := examples.counts).values():
            told = ", ".join(f"{count:,} {name}" for name, count in counts.items())
            raise StageError(
                self._job.stage,
                f"the rows of `{named}` don't have both labels: {told}"
                + (f", {examples.unlabelled:,} without a label" if examples.unlabelled else ""),
                cause="what is good is only learned beside what is bad",
                remedy="give rows of both; or two stages, as {good: STAGE, bad: STAGE}",
            )
        return examples

    def _take(self, rows: list[Row], examples: Examples) -> None:
        for row, seen in zip(rows, self._headed.read(rows), strict=True):
            if seen.ids:
                examples.seen.append(seen)
                examples.labels.append(int(row["label"]))
                examples.ids.add(row["id"])
            else:
                examples.unusable += 1

    def _collate(self, batch: Sequence[Example]) -> dict[str, torch.Tensor]:
        """What the model takes, and target, (rows,) in int64."""
        inputs = self._headed.read.tensors([seen for seen, _ in batch], device="cpu")
        return {**inputs, "target": torch.tensor([label for _, label in batch])}


class ClassifierTrainer(Trainer):  # type: ignore[misc]  # a subclass of what mypy takes for Any
    """With our data order, a weighted loss, and an exact evaluation."""

    def __init__(self, *, weights: Floats, read: RowReader, **arguments: Any) -> None:
        """weights: (labels,), of a row's loss by its label."""
        super().__init__(**arguments)
        self._weights, self._read = weights, read
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
        found = logits_of(self, self._read, [seen for seen, _ in self.eval_dataset])
        labels = np.array([label for _, label in self.eval_dataset], np.int64)
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
