"""The language model that a training changes, loaded, tuned and saved alike for the kinds that learn from preferences
and rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import disable_dropout_in_model

from tunery.models.adapters import lora_config
from tunery.models.generate import set_eos_token_ids
from tunery.models.load import Source, is_adapter, load_model, load_tokenizer, write_base
from tunery.spec import Dpo, Grpo, Kto, Rloo
from tunery.training.job import Job, save_model, write_once


class Policy:
    """Where it comes from and where it goes. Dropout of its own is off, so that the same tokens have the same
    probability each time they are looked at; LoRA's is as the tuner says (TRL's `disable_dropout` would put
    out that too)."""

    def __init__(self, job: Job, rank: int, as_folder: bool = False) -> None:
        """`as_folder`: its config must name a folder that has the model whole."""
        assert isinstance(job.spec, Dpo | Kto | Grpo | Rloo)
        self._job, self._rank = job, rank
        self._tuner = job.spec.tuner
        whole = as_folder or job.compute.zero_stage == 3
        self.source: Source = merged(job, rank) if whole and is_adapter(job.model) else job.model
        self.tokenizer: Any = load_tokenizer(self.source)

    def arguments(self) -> dict[str, Any]:
        """Of a trainer of TRL: the model, its tokenizer, and PEFT's configuration, None where all of it is trained."""
        return {
            "model": self._load(),
            "processing_class": self.tokenizer,
            "peft_config": None if isinstance(self._tuner, str) else lora_config(self._tuner.lora, "CAUSAL_LM"),
        }

    def second_copy(self) -> Any:
        """The model that training begins with, to be held to; None where the one without its adapter is that."""
        return None if self._by_adapter else self._load()

    def save(self, trainer: Any) -> None:
        """All ranks take part."""
        trainer.model.config.use_cache = True
        folder = self._job.out / ("adapter" if self._by_adapter else "model")
        save_model(trainer, folder, self.tokenizer, self._rank)
        if self._by_adapter and self._rank == 0:
            write_base(self._job.out, self._job.model)

    def _load(self) -> Any:
        """In float32, whole, or this rank's part of it under ZeRO-3."""
        model = load_model(self.source, torch.float32)
        model.config.use_cache = False
        disable_dropout_in_model(model)
        set_eos_token_ids(model, self.tokenizer)  # TRL's trainers that sample stop at them
        return model

    @property
    def _by_adapter(self) -> bool:
        return not isinstance(self._tuner, str)


def merged(job: Job, rank: int) -> Source:
    """An adapter merged into its base by rank 0 alone: under ZeRO-3 the base would load in pieces, and PEFT (0.21)
    merges whole weights only."""

    def write(folder: Path) -> None:
        load_model(job.model, torch.float32).save_pretrained(folder)
        load_tokenizer(job.model).save_pretrained(folder)

    return write_once(job.work / "merged", rank, write)
