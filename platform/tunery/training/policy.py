"""The policy of the preference and RL trainers (dpo, kto, grpo, rloo): loading, LoRA, reference model, saving."""

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
    """Loads and saves the policy. The model's own dropout is disabled, so that log-probabilities are deterministic;
    LoRA dropout stays as configured (TRL's `disable_dropout` would disable that too)."""

    def __init__(self, job: Job, rank: int, as_folder: bool = False) -> None:
        """`as_folder`: the name in the model's config must be a folder that holds the full model."""
        assert isinstance(job.spec, Dpo | Kto | Grpo | Rloo)
        self._job, self._rank = job, rank
        self._tuner = job.spec.tuner
        needs_merged = as_folder or job.compute.zero_stage == 3
        self.source: Source = merge_adapter(job, rank) if needs_merged and is_adapter(job.model) else job.model
        self.tokenizer: Any = load_tokenizer(self.source)

    def arguments(self) -> dict[str, Any]:
        """Return a TRL trainer's arguments: model, tokenizer and PEFT config (None for full fine-tuning)."""
        return {
            "model": self._load(),
            "processing_class": self.tokenizer,
            "peft_config": None if isinstance(self._tuner, str) else lora_config(self._tuner.lora, "CAUSAL_LM"),
        }

    def reference_model(self) -> Any:
        """Load the reference model, a copy of the initial policy; None with LoRA, where the reference is the base."""
        return None if self._is_lora else self._load()

    def save(self, trainer: Any) -> None:
        """Save the policy to the artifact. Call on all ranks."""
        trainer.model.config.use_cache = True
        folder = self._job.out / ("adapter" if self._is_lora else "model")
        save_model(trainer, folder, self.tokenizer, self._rank)
        if self._is_lora and self._rank == 0:
            write_base(self._job.out, self._job.model)

    def _load(self) -> Any:
        """Load the model in float32, sharded under ZeRO-3."""
        model = load_model(self.source, torch.float32)
        model.config.use_cache = False
        disable_dropout_in_model(model)
        set_eos_token_ids(model, self.tokenizer)  # TRL's trainers stop generation at these
        return model

    @property
    def _is_lora(self) -> bool:
        return not isinstance(self._tuner, str)


def merge_adapter(job: Job, rank: int) -> Source:
    """Merge an adapter into its base on rank 0 and return the merged model's source. Under ZeRO-3 the base would load
    sharded, and PEFT (0.21) can merge only complete weights."""

    def write(folder: Path) -> None:
        load_model(job.model, torch.float32).save_pretrained(folder)
        load_tokenizer(job.model).save_pretrained(folder)

    return write_once(job.work / "merged", rank, write)
