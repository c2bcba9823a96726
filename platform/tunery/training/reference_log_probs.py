"""Log-probabilities of responses under the policy and the reference, for the DPO and KTO trainers.

The reference is the initial policy: the base model with LoRA, else a second copy, which ZeRO-3 shards like the first.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from tunery.training.distributed_eval import FixedOrderMixin

TRL_SETTINGS = {"max_length": None, "disable_dropout": False, "remove_unused_columns": False}
"""Settings of DPOConfig and KTOConfig: rows are tokenized and truncated already, and Policy disables the model's own
dropout."""


class ReferenceLogProbsMixin(FixedOrderMixin):
    """Mixin for TRL's DPOTrainer and KTOTrainer (1.16), which have `model`, `ref_model` and a fused head."""

    ref_model: Any
    """None with an adapter: the reference is then the base of `model`."""
    reference_free = False
    """Whether log p under the reference counts as 0."""

    def log_ratios(self, model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return log p under the policy minus log p under the reference of each response, (sequences,) float32 in nats.
        The reference has no gradient."""
        log_probs = response_log_probs(model, batch)
        if self.reference_free:
            return log_probs
        without_adapter: AbstractContextManager[Any] = nullcontext()
        if self.ref_model is None:
            without_adapter = use_adapter(self.accelerator.unwrap_model(self.model), adapter_name=None)
        checkpointing = self.args.gradient_checkpointing_kwargs
        with torch.no_grad(), disable_gradient_checkpointing(self.model, checkpointing), without_adapter:
            reference = response_log_probs(self.ref_model or self.model, batch)
        return log_probs - reference

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        """Return the dataset unchanged: `precompute_ref_log_probs` is set only to keep TRL from loading a reference
        model."""
        return dataset


def response_log_probs(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the sum of the log-probabilities of each response's tokens, (sequences,) float32 in nats, by TRL's fused
    head."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}
    log_probs: torch.Tensor = model(**inputs, use_cache=False, fused_lm_head=True).log_probs.sum(dim=1)
    return log_probs
