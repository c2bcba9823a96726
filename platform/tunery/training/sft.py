"""What `pretrain` and `sft` learn from: blocks of texts, or conversations whose answers count; by TRL's SFTTrainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainerControl
from trl import SFTConfig, SFTTrainer

from tunery.models.adapters import lora_config
from tunery.models.load import Source, is_adapter, load_model, load_tokenizer, write_base
from tunery.models.scratch import write_scratch_model
from tunery.models.tokenized_dataset import Integers
from tunery.spec import Pretrain, Sft
from tunery.store.rows import CONTENT, Row
from tunery.training.batches import evaluation_batches
from tunery.training.job import Job, rows_of, save_model, write_once
from tunery.training.policy import merged
from tunery.training.reference_log_probs import indices, padded
from tunery.training.reload_check import PROBED, LanguageProbe
from tunery.training.sequences import TrainingSequences, read_sequences


class SftTask:
    """A causal language model, new or not, whole or by an adapter."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError when no row can be learned from, or none of eval_data measured."""
        assert isinstance(job.spec, Pretrain | Sft)
        self._job, self._spec, self._rank = job, job.spec, rank
        source = job.model
        if "scratch" in source:
            source = _new_model(job, rank)
        elif job.compute.zero_stage == 3 and is_adapter(source):
            source = merged(job, rank)
        self._source: Source = source
        self._tokenizer = load_tokenizer(source)
        self._data, self._measured = read_sequences(job, self._tokenizer)
        self.examples = self._data

    def trainer(self, arguments: dict[str, Any], order: Integers, steps: TrainerCallback) -> SftTrainer:
        # Under ZeRO-3 these make transformers shard the model while it loads.
        settings = SFTConfig(
            **arguments,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        )
        model = load_model(self._source, torch.float32)
        model.config.use_cache = False
        tuner = self._spec.tuner if isinstance(self._spec, Sft) else "full"
        return SftTrainer(
            model=model,
            args=settings,
            train_dataset=indices(order),
            data_collator=lambda rows: self._collate(self._data, [row["index"] for row in rows]),
            evaluated=self._measured,
            collate_evaluated=lambda batch: self._collate(self._measured, batch),
            processing_class=self._tokenizer,
            peft_config=None if isinstance(tuner, str) else lora_config(tuner.lora, "CAUSAL_LM"),
            callbacks=[steps],
        )

    def save(self, trainer: SftTrainer) -> None:
        adapter = isinstance(self._spec, Sft) and self._spec.tuner != "full"
        trainer.model.config.use_cache = True
        save_model(trainer, self._job.out / ("adapter" if adapter else "model"), self._tokenizer, self._rank)
        if adapter and self._rank == 0:
            write_base(self._job.out, self._job.model)

    def probe(self, parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, self._data.first(PROBED), parameters)

    def counted(self) -> dict[str, Any]:
        trains = (
            {"train_on": self._spec.train_on, "truncate": self._spec.truncate} if isinstance(self._spec, Sft) else {}
        )
        return {**self._data.facts(), **trains, "eval_rows": self._measured.stats.rows}

    def found(self, trainer: SftTrainer) -> dict[str, Any]:
        return {}

    def _collate(self, sequences: TrainingSequences, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        return padded([(sequences.ids(row), sequences.labels(row)) for row in batch], self._tokenizer.pad_token_id)


def _new_model(job: Job, rank: int) -> Source:
    texts = (_plain_text(row) for row in rows_of(job.rows, CONTENT))
    name = job.model["scratch"]
    return write_once(job.work / "new", rank, lambda folder: write_scratch_model(folder, name, texts, job.seed))


def _plain_text(row: Row) -> str:
    return row["text"] or "\n".join(turn["content"] for turn in row["messages"])


class SftTrainer(SFTTrainer):  # type: ignore[misc]  # trl ships no types
    """With three changes: the training set comes in the order in which it is to be seen (training/batches.py), the
    evaluation's loss is exact, and steps are told to the event log."""

    def __init__(
        self,
        *,
        evaluated: TrainingSequences,
        collate_evaluated: Callable[[list[int]], dict[str, torch.Tensor]],
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        self._evaluated, self._collate_evaluated = evaluated, collate_evaluated

    def _reject_skip_prepare_without_labels(self, *args: Any, **kwargs: Any) -> None:
        """Rows are indices, and the collator gives them labels: TRL (1.16) looks for them among the columns."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Loss in nats per answer token over the whole set.

        transformers averages the means of batches, which weighs tokens by their batch and so changes with the number
        of workers. Here sums and counts of tokens are added over all ranks.
        """
        size = self.args.per_device_eval_batch_size
        batches = evaluation_batches(self._evaluated.lengths, size, dist.get_rank(), dist.get_world_size())
        self.model.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch, counts in batches:
            inputs = self._prepare_inputs(self._collate_evaluated(batch))
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = self.model_wrapped(**inputs, use_cache=False, fused_lm_head=True)
            if counts:
                totals += torch.stack([-outputs.log_probs.double().sum(), outputs.label_mask.double().sum()])
        dist.all_reduce(totals)
        self.model.train()
        metrics = {"eval_loss": float(totals[0] / totals[1].clamp(min=1))}
        self.log(metrics)
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The manifest tells more, and a card would be written anew into every checkpoint."""
