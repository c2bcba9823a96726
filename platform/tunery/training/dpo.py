"""`dpo`: direct preference optimization on pairs (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), by TRL's
DPOTrainer.

The implicit reward of a response is beta x (log p under the model - log p under the reference), summed over its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from tunery.models.metrics import preference_accuracy
from tunery.models.tokenized_dataset import Integers
from tunery.spec import Dpo
from tunery.training.distributed_eval import index_dataset, pad_batch
from tunery.training.job import Job
from tunery.training.pairs import PairSet
from tunery.training.policy import Policy
from tunery.training.reference_log_probs import SETTINGS, ReferenceLogProbs
from tunery.training.reload_check import PROBED, LanguageProbe
from tunery.training.sequences import read_row_sequences


class DpoTask:
    """The trainer adapter of `dpo`."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError if no pair of `data`, or of `eval_data`, is usable."""
        assert isinstance(job.spec, Dpo)
        self._job, self._spec = job, job.spec
        self._policy = Policy(job, rank)
        data, eval_data = read_row_sequences(job, self._policy.tokenizer)
        self._data, self._eval_data = PairSet(data), PairSet(eval_data)
        self.examples = self._data

    def trainer(self, arguments: dict[str, Any], order: Integers, callback: TrainerCallback) -> DpoTrainer:
        # Before the models are loaded: under ZeRO-3 the arguments make transformers shard them while they load.
        # TRL 1.16 has no reference_free any more; it loads no reference if log-probabilities are precomputed.
        reference_free = self._spec.reference_free
        settings = DPOConfig(**arguments, **SETTINGS, beta=self._spec.beta, precompute_ref_log_probs=reference_free)
        return DpoTrainer(
            **self._policy.arguments(),
            spec=self._spec,
            ref_model=None if reference_free else self._policy.reference_model(),
            args=settings,
            train_dataset=index_dataset(order),
            data_collator=lambda rows: self._collate(self._data, [row["index"] for row in rows]),
            eval_lengths=self._eval_data.lengths,
            collate_eval=lambda batch: self._collate(self._eval_data, batch),
            callbacks=[callback],
        )

    def save(self, trainer: DpoTrainer) -> None:
        self._policy.save(trainer)

    def probe(self, parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, self._data.sequences.first(2 * PROBED)[::2], parameters)

    def data_stats(self) -> dict[str, Any]:
        eval_stats = self._eval_data.sequences.stats
        return {
            **self._data.sequences.facts(),
            "sequences": len(self._data),
            "eval_rows": eval_stats.rows,
            "eval_unusable": eval_stats.num_unusable,
        }

    def final_metrics(self, trainer: DpoTrainer) -> dict[str, Any]:
        """eval_accuracy and eval_margin of the last evaluation."""
        return {name: trainer.last_eval_metrics.get(name) for name in ("eval_accuracy", "eval_margin")}

    def _collate(self, pairs: PairSet, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """Batch of the chosen sequences, followed by the rejected ones."""
        data = pairs.sequences
        return pad_batch(
            [(data.ids(row), data.labels(row)) for row in pairs.sequence_indices(batch)],
            self._policy.tokenizer.pad_token_id,
        )


class DpoTrainer(ReferenceLogProbs, DPOTrainer):  # type: ignore[misc]  # trl ships no types
    """TRL's DPOTrainer with a fixed data order, its own per-pair losses and an exact evaluation.

    Losses are computed here because TRL 1.16 ignores `label_smoothing` for the sigmoid loss and returns only means of
    batches.
    """

    def __init__(
        self,
        *,
        spec: Dpo,
        eval_lengths: Integers,
        collate_eval: Callable[[list[int]], dict[str, torch.Tensor]],
        **arguments: Any,
    ) -> None:
        self._spec, self.reference_free = spec, spec.reference_free
        self._eval_lengths, self._collate_eval = eval_lengths, collate_eval
        super().__init__(**arguments)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Mean loss over pairs, which does not depend on the micro batch size or the number of workers."""
        losses, margins = self._losses_and_margins(model, inputs).unbind(dim=1)
        margins = self.accelerator.gather(margins.detach())
        self._metrics["train"]["margin"].append(margins.mean().item())
        self._metrics["train"]["accuracy"].append(preference_accuracy(margins.double().cpu().numpy()))
        return losses.mean()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the complete set: eval_loss (nats per pair), eval_accuracy (fraction of pairs whose chosen response
        has the larger implicit reward, ties count half), eval_margin (mean difference of the two rewards)."""

        def evaluate_batch(batch: list[int]) -> torch.Tensor:
            return self._losses_and_margins(self.model_wrapped, self._prepare_inputs(self._collate_eval(batch)))

        losses, margins = self.evaluate_rows(self._eval_lengths, 2, evaluate_batch).unbind(dim=1)
        return self.report_metrics(
            {
                "eval_loss": losses.mean().item(),
                "eval_accuracy": preference_accuracy(margins.cpu().numpy()),
                "eval_margin": margins.mean().item(),
            }
        )

    def _losses_and_margins(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Loss and margin of each pair, (pairs, 2)."""
        chosen, rejected = self.log_ratios(model, inputs).chunk(2)
        tokens = (inputs["labels"][:, 1:] != -100).sum(dim=1).chunk(2)
        losses = pair_losses(self._spec, chosen, rejected, *tokens)
        return torch.stack([losses, self._spec.beta * (chosen - rejected)], dim=1)


def pair_losses(
    spec: Dpo,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    chosen_tokens: torch.Tensor,
    rejected_tokens: torch.Tensor,
) -> torch.Tensor:
    """DPO losses in nats, (pairs,), from the log ratios and the token counts of both responses, (pairs,) each.

    sigmoid, with label smoothing e: -(1 - e) log s(b d) - e log s(-b d), d = chosen - rejected (cDPO:
    https://ericmitchell.ai/cdpo.pdf). hinge: max(0, 1 - b d). ipo: (d - 1 / 2b)^2 with ratios per token, as its authors
    confirmed to TRL.
    """
    margins = spec.beta * (chosen - rejected)
    if spec.loss == "hinge":
        return torch.relu(1 - margins)
    if spec.loss == "ipo":
        return (chosen / chosen_tokens - rejected / rejected_tokens - 1 / (2 * spec.beta)) ** 2
    smoothing = spec.label_smoothing
    return -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)
