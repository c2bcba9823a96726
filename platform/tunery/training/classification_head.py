"""A language model with a classification head, for classifiers and reward models: initialization, inputs, logits and
saving."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from tunery.models.adapters import freeze_untrained, peft_config
from tunery.models.classifier_inputs import ClassifierEncoder
from tunery.models.encode import Encoded
from tunery.models.load import (
    Source,
    is_adapter,
    load_original_tokenizer,
    load_saved_classifier,
    load_with_new_head,
    weightless_model_with_head,
    write_base,
    write_head,
)
from tunery.models.metrics import Floats, Integers
from tunery.spec import Tuner, adapter_spec
from tunery.training.job import Job, save_model, write_once
from tunery.training.reload_check import MAX_SEQUENCES, first_tokens
from tunery.training.sequences import SequenceSet, read_row_sequences

NEW_MODULES = "new_modules.json"
"""File with the names of the randomly initialized modules, in the folder of a model that rank 0 has written."""


class ModelWithHead:
    """A language model with a classification head, one output per label: loads, encodes for and saves it."""

    def __init__(self, job: Job, tuner: Tuner, labels: Sequence[str], rank: int) -> None:
        """Call on all ranks: rank 0 may have to write the model first."""
        self._job, self._tuner, self._labels, self._rank = job, tuner, labels, rank
        self._source, self._new_modules = _initial_model(job, labels, rank)
        meta_model = weightless_model_with_head(self._source, labels)
        self.tokenizer = set_padding_token(load_original_tokenizer(job.model), meta_model)
        self.encoder = ClassifierEncoder(meta_model, self.tokenizer, job.spec.max_length)
        """Encodes rows by the same function as when the model scores rows."""

    def load(self) -> Any:
        """Load the model in fp32, with the same random head on every rank; under ZeRO-3 its weights are sharded."""
        set_seed(self._job.seed)
        model, new_modules = load_with_new_head(self._source, self._labels, torch.float32)
        new_modules = self._new_modules or new_modules
        model.config.use_cache = False
        freeze_untrained(model, self._tuner, new_modules)
        if (config := peft_config(self._tuner, "SEQ_CLS", new_modules)) is None:
            return model
        from peft import get_peft_model

        set_seed(self._job.seed)
        # PEFT (0.21) would cast the adapter of a bf16 base to fp32, but not the head, and ZeRO-3 needs one dtype.
        return get_peft_model(model, config, autocast_adapter_dtype=False)

    def sequences(self) -> tuple[SequenceSet, SequenceSet]:
        """Return the training and the evaluation sequences. Call on all ranks."""
        return read_row_sequences(self._job, self.tokenizer, self.encoder.encoding)

    def probe(self, rows: Sequence[Encoded], num_parameters: int) -> HeadProbe:
        return HeadProbe(self._job, self.encoder, rows, num_parameters)

    def save(self, trainer: Any) -> None:
        """Save the model so that models.load.load_classifier can load it. Call on all ranks."""
        has_adapter = adapter_spec(self._tuner).has_adapter
        trainer.model.config.use_cache = True
        save_model(trainer, self._job.out / ("adapter" if has_adapter else "model"), self.tokenizer, self._rank)
        if has_adapter and self._rank == 0:
            write_base(self._job.out, self._job.model)
            write_head(self._job.out, self._labels)


class HeadProbe:
    """Logits of a few training rows (training/reload_check.py, `Probe`)."""

    output_name = "output"

    def __init__(self, job: Job, encoder: ClassifierEncoder, rows: Sequence[Encoded], num_parameters: int) -> None:
        """rows: the first training rows; num_parameters: number of parameters of the model."""
        self._job, self._encoder = job, encoder
        rows = rows[:MAX_SEQUENCES]
        truncated = first_tokens([item.ids for item in rows], num_parameters)
        self._rows = [
            Encoded(ids, (), token_types=item.token_types and item.token_types[: len(ids)])
            for ids, item in zip(truncated, rows, strict=True)
        ]

    def trained_outputs(self, trainer: Any) -> list[float]:
        lengths = [len(item.ids) for item in self._rows]
        outputs: list[float] = (
            compute_logits(trainer, self._encoder, lengths, self._rows.__getitem__).flatten().tolist()
        )
        return outputs

    @torch.no_grad()
    def saved_outputs(self) -> list[float]:
        model, _ = load_saved_classifier(self._job.out, self._job.model, torch.float32)
        model.eval()
        logits_nl = torch.cat([model(**self._encoder.tensors([item], device="cpu")).logits for item in self._rows])
        outputs: list[float] = logits_nl.float().flatten().tolist()
        return outputs


def set_padding_token(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> PreTrainedTokenizerBase:
    """Set the tokenizer's padding token to that of the model's config, and return the tokenizer.

    The model finds the last token of a row by the config's padding token. At the start of a training, transformers
    (`align_special_tokens`, 5.23) and TRL's RewardTrainer (1.16) overwrite it with the tokenizer's. If they differed,
    the model would take its output from a padding token.
    """
    pad_token_id = model.config.get_text_config().pad_token_id
    if pad_token_id is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad_token_id)
    return tokenizer


def compute_logits(
    trainer: Any, encoder: ClassifierEncoder, lengths: Sequence[int] | Integers, get_row: Callable[[int], Encoded]
) -> Floats:
    """Return the logits of all rows under the trainer's current model, (rows, labels) float64, the same on every rank.

    trainer: a DistributedEvalMixin; lengths: number of tokens of each row; get_row: returns the row of an index. Call
    on all ranks, which share the work.
    """

    def evaluate_batch(batch: list[int]) -> torch.Tensor:
        inputs = trainer._prepare_inputs(encoder.tensors([get_row(index) for index in batch], device="cpu"))
        logits_bl: torch.Tensor = trainer.model_wrapped(**inputs).logits
        return logits_bl

    logits: Floats = trainer.evaluate_rows(lengths, trainer.model.config.num_labels, evaluate_batch).cpu().numpy()
    return logits


def num_shared_rows(data: SequenceSet, eval_data: SequenceSet) -> int:
    """Return the number of rows that are in both training and evaluation data."""
    return len(np.intersect1d(data.row_ids(), eval_data.row_ids()))


def _initial_model(job: Job, labels: Sequence[str], rank: int) -> tuple[Source, list[str]]:
    """Return the source to load the model from, and its randomly initialized modules; [] if loading reports them.

    For an adapter, and for any model under ZeRO-3, rank 0 first writes a model with the adapter merged and the head
    initialized, because ZeRO-3 loads sharded weights.
    """
    if job.compute.zero_stage < 3 and not is_adapter(job.model):
        return job.model, []
    folder = job.staging_dir / "model-with-head"

    def write(folder: Path) -> None:
        set_seed(job.seed)
        model, new_modules = load_with_new_head(job.model, labels, torch.float32)
        model.save_pretrained(folder)
        load_original_tokenizer(job.model).save_pretrained(folder)
        (folder / NEW_MODULES).write_text(json.dumps(new_modules))

    return write_once(folder, rank, write), json.loads((folder / NEW_MODULES).read_text())
