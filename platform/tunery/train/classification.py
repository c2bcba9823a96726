"""What `classifier` learns: to tell good rows from bad ones, by transformers' Trainer, from labelled rows.

A row is shown to the model as to the scorer that will use it (models/shown.py). The tokens of all labelled rows are in
the memory of every worker, as in every training here: 100,000 rows of 300 tokens are about 0.6 GB.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainingArguments, set_seed

from tunery.errors import StageError
from tunery.models.load import (
    Source,
    is_adapter,
    load_own_tokenizer,
    load_with_new_head,
    outline_with_head,
    write_base,
    write_head,
)
from tunery.models.metrics import Floats, Integers, auc, class_weights, cross_entropy, fitted_temperature
from tunery.models.shown import RowReader, Seen
from tunery.models.tuners import lora_config
from tunery.spec import LABELS, ClassifierTraining
from tunery.store.rows import CONTENT, Row
from tunery.train.batches import evaluation_batches
from tunery.train.job import Job, Rows, once, rows_of, save_model

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
        self._job, self._spec, self._rank = job, job.spec, rank
        self._tokenizer = load_own_tokenizer(job.model)
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._source, self._new = _headed(job, rank)
        self._read = RowReader(outline_with_head(self._source, LABELS), self._tokenizer, job.spec.max_length)
        self._data = self._examples(job.rows, "data")
        self._measured = self._examples(job.eval_rows, "eval_data") if job.eval_rows else Examples()
        self.lengths = [len(seen.ids) for seen in self._data.seen]
        labels = np.array(self._data.labels, np.int64)
        self._weights = class_weights(labels, len(LABELS)) if job.spec.balanced else np.ones(len(LABELS))

    def trainer(self, arguments: dict[str, Any], order: list[int], steps: TrainerCallback) -> ClassifierTrainer:
        settings = TrainingArguments(
            **arguments, remove_unused_columns=False, gradient_checkpointing_kwargs={"use_reentrant": False}
        )
        set_seed(self._job.seed)  # every rank draws the same head
        model, new = load_with_new_head(self._source, LABELS, torch.float32)
        new = self._new or new
        model.config.use_cache = False
        if not isinstance(self._spec.tuner, str):
            from peft import get_peft_model

            set_seed(self._job.seed)
            model = get_peft_model(model, lora_config(self._spec.tuner.lora, "SEQ_CLS", new))
        examples = list(zip(self._data.seen, self._data.labels, strict=True))
        return ClassifierTrainer(
            model=model,
            args=settings,
            train_dataset=[examples[index] for index in order],
            eval_dataset=list(zip(self._measured.seen, self._measured.labels, strict=True)),
            processing_class=self._tokenizer,
            data_collator=self._collate,
            callbacks=[steps],
            weights=self._weights,
        )

    def save(self, trainer: ClassifierTrainer) -> None:
        adapter = not isinstance(self._spec.tuner, str)
        trainer.model.config.use_cache = True
        save_model(trainer, self._job.out / ("adapter" if adapter else "model"), self._tokenizer, self._rank)
        if adapter and self._rank == 0:
            write_base(self._job.out, self._job.model)
            write_head(self._job.out, LABELS)

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
        for row, seen in zip(rows, self._read(rows), strict=True):
            if seen.ids:
                examples.seen.append(seen)
                examples.labels.append(int(row["label"]))
                examples.ids.add(row["id"])
            else:
                examples.unusable += 1

    def _collate(self, batch: Sequence[Example]) -> dict[str, torch.Tensor]:
        """What the model takes, and target, (rows,) in int64."""
        inputs = self._read.tensors([seen for seen, _ in batch], device="cpu")
        return {**inputs, "target": torch.tensor([label for _, label in batch])}


def _headed(job: Job, rank: int) -> tuple[Source, list[str]]:
    """Where the model is loaded from, and the modules in it that were random, where loading won't tell. An adapter is
    merged first, and under ZeRO-3, which loads weights in pieces, the head must be drawn before: rank 0 writes the
    model whole then."""
    if job.compute.zero_stage < 3 and not is_adapter(job.model):
        return job.model, []
    folder = job.work / "headed"

    def write(folder: Path) -> None:
        set_seed(job.seed)
        model, new = load_with_new_head(job.model, LABELS, torch.float32)
        model.save_pretrained(folder)
        load_own_tokenizer(job.model).save_pretrained(folder)
        (folder / "new.json").write_text(json.dumps(new))

    return once(folder, rank, write), json.loads((folder / "new.json").read_text())


class ClassifierTrainer(Trainer):  # type: ignore[misc]  # a subclass of what mypy takes for Any
    """With our data order, a weighted loss, and an exact evaluation."""

    def __init__(self, *, weights: Floats, **arguments: Any) -> None:
        """weights: (labels,), of a row's loss by its label."""
        super().__init__(**arguments)
        self._weights = weights
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
        rows: list[Example] = list(self.eval_dataset)
        lengths, size = [len(seen.ids) for seen, _ in rows], self.args.per_device_eval_batch_size
        logits_nl = torch.zeros(len(rows), len(self._weights), dtype=torch.float64, device=self.args.device)
        self.model.eval()
        for batch, counts in evaluation_batches(lengths, size, dist.get_rank(), dist.get_world_size()):
            inputs = self._prepare_inputs(self.data_collator([rows[index] for index in batch]))
            inputs.pop("target")
            with torch.no_grad(), self.compute_loss_context_manager():
                logits_bl = self.model_wrapped(**inputs).logits
            if counts:
                logits_nl[batch] = logits_bl.double()
        dist.all_reduce(logits_nl)
        self.model.train()
        found, labels = logits_nl.cpu().numpy(), np.array([label for _, label in rows], np.int64)
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
