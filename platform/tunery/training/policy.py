"""The policy of the preference and RL trainers (dpo, kto, grpo, rloo): loading, LoRA, reference model, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from trl.trainer.utils import disable_dropout_in_model

from tunery.models.adapters import freeze_untrained, peft_config
from tunery.models.generate import set_eos_token_ids
from tunery.models.load import Source, is_adapter, load_model, load_tokenizer, write_base
from tunery.spec import adapter_spec, tuner_of
from tunery.training.job import Job, save_model, write_once


class Policy:
    """Loads and saves the policy.

    The model's own dropout is disabled, so that log-probabilities are deterministic. LoRA dropout stays as configured;
    TRL's `disable_dropout` would disable it too.
    """

    def __init__(self, job: Job, rank: int, requires_model_folder: bool = False) -> None:
        """Call on all ranks. requires_model_folder: the name in the model's config must be a folder with the full
        model, so an adapter is merged into its base first."""
        self._job, self._rank = job, rank
        self._tuner = tuner_of(job.spec)
        requires_merged = requires_model_folder or job.compute.zero_stage == 3
        self.source: Source = merge_adapter(job, rank) if requires_merged and is_adapter(job.model) else job.model
        self.tokenizer: Any = load_tokenizer(self.source)

    def trainer_arguments(self) -> dict[str, Any]:
        """Load the model; return arguments of a TRL trainer: model, tokenizer, PEFT config (None without adapter)."""
        model = self._load()
        freeze_untrained(model, self._tuner)
        return {
            "model": model,
            "processing_class": self.tokenizer,
            "peft_config": peft_config(self._tuner, "CAUSAL_LM"),
        }

    def reference_model(self) -> Any:
        """Load the reference model, a copy of the initial policy. None with an adapter: the reference is then its
        base."""
        return None if self._has_adapter else self._load()

    def save(self, trainer: Any) -> None:
        """Save the policy to the artifact. Call on all ranks."""
        trainer.model.config.use_cache = True
        folder = self._job.out / ("adapter" if self._has_adapter else "model")
        save_model(trainer, folder, self.tokenizer, self._rank)
        if self._has_adapter and self._rank == 0:
            write_base(self._job.out, self._job.model)

    def _load(self) -> Any:
        """Load the model in float32, sharded under ZeRO-3."""
        model = load_model(self.source, torch.float32)
        model.config.use_cache = False
        disable_dropout_in_model(model)
        set_eos_token_ids(model, self.tokenizer)  # TRL's trainers stop generation at these
        return model

    @property
    def _has_adapter(self) -> bool:
        return adapter_spec(self._tuner).has_adapter


def merge_adapter(job: Job, rank: int) -> Source:
    """Merge an adapter into its base on rank 0, and return the source of the merged model. Call on all ranks.

    Under ZeRO-3 transformers loads sharded weights, and PEFT (0.21) can merge only complete ones.
    """

    def write(folder: Path) -> None:
        load_model(job.model, torch.float32).save_pretrained(folder)
        load_tokenizer(job.model).save_pretrained(folder)

    return write_once(job.staging_dir / "merged", rank, write)
