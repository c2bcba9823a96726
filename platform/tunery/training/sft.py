"""`pretrain` and `sft`: language modelling on blocks of text, or on the responses of conversations, by TRL's
SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from tunery.models.adapters import freeze_untrained, peft_config
from tunery.models.load import Source, is_adapter, load_model, load_tokenizer, write_base
from tunery.models.scratch import write_scratch_model
from tunery.models.tokenized_dataset import Integers
from tunery.spec import Pretrain, Sft, adapter_spec, tuner_of
from tunery.store.rows import CONTENT, Row
from tunery.training.distributed_eval import FixedOrderMixin, index_dataset, pad_batch
from tunery.training.job import Job, rows_of, save_model, write_once
from tunery.training.policy import merge_adapter
from tunery.training.reload_check import NUM_PROBE_CANDIDATES, LanguageProbe
from tunery.training.sequences import TrainingSequences, read_sequences


class SftTask:
    """The training task of `pretrain` and `sft`: a causal language model, pretrained or from scratch."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError if no row of `data`, or of `eval_data`, is usable."""
        assert isinstance(job.spec, Pretrain | Sft)
        self._job, self._spec, self._rank = job, job.spec, rank
        source = job.model
        if "scratch" in source:
            source = _scratch_model(job, rank)
        elif job.compute.zero_stage == 3 and is_adapter(source):
            source = merge_adapter(job, rank)
        self._source: Source = source
        self._tokenizer = load_tokenizer(source)
        self._data, self._eval_data = read_sequences(job, self._tokenizer)
        self.examples = self._data

    def build_trainer(self, arguments: dict[str, Any], order: Integers, callback: TrainerCallback) -> SftTrainer:
        # Construct the arguments before loading the model: under ZeRO-3 they make transformers shard it.
        config = SFTConfig(
            **arguments,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        )
        model = load_model(self._source, torch.float32)
        model.config.use_cache = False
        tuner = tuner_of(self._spec)
        freeze_untrained(model, tuner)
        return SftTrainer(
            model=model,
            args=config,
            train_dataset=index_dataset(order),
            data_collator=lambda rows: self._collate(self._data, [row["index"] for row in rows]),
            eval_data=self._eval_data,
            collate_eval=lambda batch: self._collate(self._eval_data, batch),
            processing_class=self._tokenizer,
            peft_config=peft_config(tuner, "CAUSAL_LM"),
            callbacks=[callback],
        )

    def save(self, trainer: SftTrainer) -> None:
        has_adapter = adapter_spec(tuner_of(self._spec)).has_adapter
        trainer.model.config.use_cache = True
        save_model(trainer, self._job.out / ("adapter" if has_adapter else "model"), self._tokenizer, self._rank)
        if has_adapter and self._rank == 0:
            write_base(self._job.out, self._job.model)

    def probe(self, num_parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, self._data.first(NUM_PROBE_CANDIDATES), num_parameters)

    def data_stats(self) -> dict[str, Any]:
        settings = {}
        if isinstance(self._spec, Sft):
            settings = {"train_on": self._spec.train_on, "truncate": self._spec.truncate}
        return {**self._data.facts(), **settings, "eval_rows": self._eval_data.stats.rows}

    def final_metrics(self, trainer: SftTrainer) -> dict[str, Any]:
        return {}

    def _collate(self, sequences: TrainingSequences, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        pad_token_id = self._tokenizer.pad_token_id
        return pad_batch([(sequences.ids(index), sequences.labels(index)) for index in batch], pad_token_id)


def _scratch_model(job: Job, rank: int) -> Source:
    """Write a new model with a tokenizer trained on the rows of `data`, and return its source. Call on all ranks."""
    texts = (_plain_text(row) for row in rows_of(job.data, CONTENT))
    name, folder = job.model["scratch"], job.staging_dir / "scratch"
    return write_once(folder, rank, lambda folder: write_scratch_model(folder, name, texts, job.seed))


def _plain_text(row: Row) -> str:
    """Return a text, or the contents of a conversation's messages."""
    return row["text"] or "\n".join(message["content"] for message in row["messages"])


class SftTrainer(FixedOrderMixin, SFTTrainer):  # type: ignore[misc]  # trl ships no types
    """TRL's SFTTrainer with a fixed data order (training/batches.py) and an exact evaluation loss."""

    def __init__(
        self,
        *,
        eval_data: TrainingSequences,
        collate_eval: Callable[[list[int]], dict[str, torch.Tensor]],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._eval_data, self._collate_eval = eval_data, collate_eval

    def _reject_skip_prepare_without_labels(self, *args: Any, **kwargs: Any) -> None:
        """Skip TRL's (1.16) check for a label column: the dataset consists of indices, and the collator adds the
        labels."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return eval_loss: the mean over all loss tokens of the complete evaluation set, in nats."""

        def evaluate_batch(batch: list[int]) -> torch.Tensor:
            inputs = self._prepare_inputs(self._collate_eval(batch))
            outputs = self.model_wrapped(**inputs, use_cache=False, fused_lm_head=True)
            nll_and_tokens = (-outputs.log_probs.double().sum(dim=1), outputs.label_mask.double().sum(dim=1))
            return torch.stack(nll_and_tokens, dim=1)

        nll, num_tokens = self.evaluate_rows(self._eval_data.lengths, 2, evaluate_batch).sum(dim=0)
        return self.report_metrics({"eval_loss": float(nll / num_tokens.clamp(min=1))})
