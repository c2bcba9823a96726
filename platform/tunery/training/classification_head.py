"""A language model with a new head, for what learns to give numbers to whole rows: classifiers and reward models.

How the head begins, how rows are shown to it, what it says of them, and how it is kept.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from tunery.models.adapters import lora_config
from tunery.models.classifier_inputs import ClassifierEncoder
from tunery.models.encode import Encoded
from tunery.models.load import (
    Source,
    is_adapter,
    load_own_tokenizer,
    load_saved_classifier,
    load_with_new_head,
    outline_with_head,
    write_base,
    write_head,
)
from tunery.models.metrics import Floats, Integers
from tunery.spec import Tuner
from tunery.training.batches import evaluation_batches
from tunery.training.job import Job, save_model, write_once
from tunery.training.reload_check import MAX_SEQUENCES, first_tokens
from tunery.training.sequences import SequenceSet, read_row_sequences


class ModelWithHead:
    """A head of as many outputs as there are labels, trained with the model that it is on, or beside an adapter."""

    def __init__(self, job: Job, tuner: Tuner, labels: Sequence[str], rank: int) -> None:
        """All ranks take part: rank 0 may have to write the model first."""
        self._job, self._tuner, self._labels, self._rank = job, tuner, labels, rank
        self._source, self._new = _headed(job, labels, rank)
        outline = outline_with_head(self._source, labels)
        self.tokenizer = padding_as(outline, load_own_tokenizer(job.model))
        self.read = ClassifierEncoder(outline, self.tokenizer, job.spec.max_length)
        """Rows as the scorer will show them."""

    def load(self) -> Any:
        """In fp32, with the same random weights on every rank; under ZeRO-3 sharded."""
        set_seed(self._job.seed)
        model, new = load_with_new_head(self._source, self._labels, torch.float32)
        new = self._new or new
        model.config.use_cache = False
        if isinstance(self._tuner, str):
            return model
        from peft import get_peft_model

        set_seed(self._job.seed)
        return get_peft_model(model, lora_config(self._tuner.lora, "SEQ_CLS", new))

    def sequences(self) -> tuple[SequenceSet, SequenceSet]:
        """Those that are trained on, and those that are evaluated; all ranks take part."""
        return read_row_sequences(self._job, self.tokenizer, self.read.encoding)

    def probe(self, rows: Sequence[Encoded], parameters: int) -> HeadProbe:
        return HeadProbe(self._job, self.read, rows, parameters)

    def save(self, trainer: Any) -> None:
        """So that models.load.load_classifier finds it."""
        adapter = not isinstance(self._tuner, str)
        trainer.model.config.use_cache = True
        save_model(trainer, self._job.out / ("adapter" if adapter else "model"), self.tokenizer, self._rank)
        if adapter and self._rank == 0:
            write_base(self._job.out, self._job.model)
            write_head(self._job.out, self._labels)


class HeadProbe:
    """The outputs of the head for a few rows (training/reload_check.py)."""

    what = "output"

    def __init__(self, job: Job, read: ClassifierEncoder, rows: Sequence[Encoded], parameters: int) -> None:
        """`rows`: the first that are trained on; `parameters`: of the model."""
        self._job, self._read = job, read
        rows = rows[:MAX_SEQUENCES]
        cut = first_tokens([item.ids for item in rows], parameters)
        self._rows = [
            Encoded(ids, (), token_types=item.token_types and item.token_types[: len(ids)])
            for ids, item in zip(cut, rows, strict=True)
        ]

    def trained(self, trainer: Any) -> list[float]:
        lengths = [len(item.ids) for item in self._rows]
        outputs: list[float] = logits_of(trainer, self._read, lengths, self._rows.__getitem__).flatten().tolist()
        return outputs

    @torch.no_grad()
    def saved(self) -> list[float]:
        model, _ = load_saved_classifier(self._job.out, self._job.model, torch.float32)
        model.eval()
        logits_nl = torch.cat([model(**self._read.tensors([item], device="cpu")).logits for item in self._rows])
        outputs: list[float] = logits_nl.float().flatten().tolist()
        return outputs


def padding_as(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer, with the padding token that the model's config names.

    Rows are padded with that one, and by it the model finds their last token. But when a training starts, transformers
    (`align_special_tokens`, 5.23) writes the tokenizer's into the config, as TRL's RewardTrainer does (1.16). A model
    of another one would then read its outputs off the padding.
    """
    pad = model.config.get_text_config().pad_token_id
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    return tokenizer


def logits_of(
    trainer: Any, read: ClassifierEncoder, lengths: Sequence[int] | Integers, row_of: Callable[[int], Encoded]
) -> Floats:
    """(rows, labels) in float64, by the transformers Trainer's model as it is now: all of them on every rank, however
    many ranks share the work. All take part. `row_of`: the row with a number, `lengths`: the tokens of each."""
    size, labels = trainer.args.per_device_eval_batch_size, trainer.model.config.num_labels
    logits_nl = torch.zeros(len(lengths), labels, dtype=torch.float64, device=trainer.args.device)
    trainer.model.eval()
    for batch, counts in evaluation_batches(lengths, size, dist.get_rank(), dist.get_world_size()):
        inputs = trainer._prepare_inputs(read.tensors([row_of(index) for index in batch], device="cpu"))
        with torch.no_grad(), trainer.compute_loss_context_manager():
            logits_bl = trainer.model_wrapped(**inputs).logits
        if counts:
            logits_nl[batch] = logits_bl.double()
    dist.all_reduce(logits_nl)
    trainer.model.train()
    found: Floats = logits_nl.cpu().numpy()
    return found


def rows_in_both(data: SequenceSet, evaluated: SequenceSet) -> int:
    """Rows that are trained on and evaluated."""
    return len(np.intersect1d(data.row_ids(), evaluated.row_ids()))


def _headed(job: Job, labels: Sequence[str], rank: int) -> tuple[Source, list[str]]:
    """Where the model is loaded from, and the modules in it that were random, where loading won't tell. An adapter is
    merged first, and under ZeRO-3, which loads weights in pieces, the head must be drawn before: rank 0 writes the
    model whole then."""
    if job.compute.zero_stage < 3 and not is_adapter(job.model):
        return job.model, []
    folder = job.work / "headed"

    def write(folder: Path) -> None:
        set_seed(job.seed)
        model, new = load_with_new_head(job.model, labels, torch.float32)
        model.save_pretrained(folder)
        load_own_tokenizer(job.model).save_pretrained(folder)
        (folder / "new.json").write_text(json.dumps(new))

    return write_once(folder, rank, write), json.loads((folder / "new.json").read_text())
