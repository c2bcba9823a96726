"""`dpo`: direct preference optimization on pairs (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), by TRL's
DPOTrainer.

The implicit reward of a response is beta x (log p under the policy - log p under the reference), summed over its
tokens.
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
from tunery.training.reference_log_probs import TRL_SETTINGS, ReferenceLogProbsMixin
from tunery.training.reload_check import NUM_PROBE_CANDIDATES, LanguageProbe
from tunery.training.sequences import read_row_sequences


class DpoTask:
    """The training task of `dpo`."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError if no pair of `data`, or of `eval_data`, is usable."""
        assert isinstance(job.spec, Dpo)
        self._job, self._spec = job, job.spec
        self._policy = Policy(job, rank)
        data, eval_data = read_row_sequences(job, self._policy.tokenizer)
        self._data, self._eval_data = PairSet(data), PairSet(eval_data)
        self.examples = self._data

    def build_trainer(self, arguments: dict[str, Any], order: Integers, callback: TrainerCallback) -> DpoTrainer:
        # Construct the arguments before loading the models: under ZeRO-3 they make transformers shard them.
        # TRL 1.16 has no `reference_free`, but loads no reference model if its log-probabilities are precomputed.
        reference_free = self._spec.reference_free
        config = DPOConfig(**arguments, **TRL_SETTINGS, beta=self._spec.beta, precompute_ref_log_probs=reference_free)
        return DpoTrainer(
            **self._policy.trainer_arguments(),
            spec=self._spec,
            ref_model=None if reference_free else self._policy.reference_model(),
            args=config,
            train_dataset=index_dataset(order),
            data_collator=lambda rows: self._collate(self._data, [row["index"] for row in rows]),
            eval_lengths=self._eval_data.lengths,
            collate_eval=lambda batch: self._collate(self._eval_data, batch),
            callbacks=[callback],
        )

    def save(self, trainer: DpoTrainer) -> None:
        self._policy.save(trainer)

    def probe(self, num_parameters: int) -> LanguageProbe:
        chosen = self._data.sequences.first(2 * NUM_PROBE_CANDIDATES)[::2]
        return LanguageProbe(self._job, chosen, num_parameters)

    def data_stats(self) -> dict[str, Any]:
        eval_stats = self._eval_data.sequences.stats
        return {
            **self._data.sequences.facts(),
            "sequences": len(self._data),
            "eval_rows": eval_stats.rows,
            "eval_unusable": eval_stats.num_unusable,
        }

    def final_metrics(self, trainer: DpoTrainer) -> dict[str, Any]:
        """Return eval_accuracy and eval_margin of the last evaluation."""
        return {name: trainer.last_eval_metrics.get(name) for name in ("eval_accuracy", "eval_margin")}

    def _collate(self, pairs: PairSet, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the padded chosen sequences of a batch of pairs, followed by the rejected ones."""
        data = pairs.sequences
        return pad_batch(
            [(data.ids(index), data.labels(index)) for index in pairs.sequence_indices(batch)],
            self._policy.tokenizer.pad_token_id,
        )


class DpoTrainer(ReferenceLogProbsMixin, DPOTrainer):  # type: ignore[misc]  # trl ships no types
    """TRL's DPOTrainer with a fixed data order, losses per pair and an exact evaluation.

    It computes the losses itself, because TRL 1.16 ignores `label_smoothing` for the sigmoid loss and returns only the
    means of batches.
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
        """Return the mean loss over pairs. It does not depend on the micro batch size or the number of workers."""
        losses, margins = self._losses_and_margins(model, inputs).unbind(dim=1)
        margins = self.accelerator.gather(margins.detach())
        self._metrics["train"]["margin"].append(margins.mean().item())
        self._metrics["train"]["accuracy"].append(preference_accuracy(margins.double().cpu().numpy()))
        return losses.mean()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the metrics of the complete evaluation set.

        eval_loss: mean loss per pair, in nats; eval_accuracy: fraction of pairs whose chosen response has the larger
        implicit reward, where ties count half; eval_margin: mean difference of the two rewards.
        """

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
        """Return loss and margin of each pair, (pairs, 2)."""
        chosen_ratios, rejected_ratios = self.log_ratios(model, inputs).chunk(2)
        num_tokens = (inputs["labels"][:, 1:] != -100).sum(dim=1).chunk(2)
        losses = pair_losses(self._spec, chosen_ratios, rejected_ratios, *num_tokens)
        return torch.stack([losses, self._spec.beta * (chosen_ratios - rejected_ratios)], dim=1)


def pair_losses(
    spec: Dpo,
    chosen_ratios: torch.Tensor,
    rejected_ratios: torch.Tensor,
    num_chosen_tokens: torch.Tensor,
    num_rejected_tokens: torch.Tensor,
) -> torch.Tensor:
    """DPO losses, (pairs,), from the log ratios (in nats) and the token counts of both responses, (pairs,) each.

    With d = chosen ratio - rejected ratio and label smoothing e:

        sigmoid: -(1 - e) log sigmoid(beta d) - e log sigmoid(-beta d), in nats; e > 0: conservative DPO
            (https://ericmitchell.ai/cdpo.pdf)
        hinge: max(0, 1 - beta d) (SLiC, https://arxiv.org/abs/2305.10425)
        ipo: (d - 1 / (2 beta))^2 with ratios per token, as its authors confirmed to TRL (Azar et al. 2023,
            https://arxiv.org/abs/2310.12036)
    """
    margins = spec.beta * (chosen_ratios - rejected_ratios)
    if spec.loss == "hinge":
        return torch.relu(1 - margins)
    if spec.loss == "ipo":
        differences = chosen_ratios / num_chosen_tokens - rejected_ratios / num_rejected_tokens
        return (differences - 1 / (2 * spec.beta)) ** 2
    smoothing = spec.label_smoothing
    return -(1 - smoothing) * logsigmoid(margins) - smoothing * logsigmoid(-margins)
