"""`dpo`: direct preference optimization on pairs (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), by TRL's
DPOTrainer.

What an answer is worth, its implicit reward, is beta x (log p under the model - log p under the reference), summed over
its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import logsigmoid
from transformers import TrainerCallback
from trl import DPOConfig, DPOTrainer

from tunery.models.metrics import preference_accuracy
from tunery.models.tokenized_dataset import Integers, TokenStats
from tunery.spec import Dpo
from tunery.training.job import Job
from tunery.training.policy import Policy
from tunery.training.reference_log_probs import SETTINGS, ReferenceLogProbs, indices, padded
from tunery.training.reload_check import PROBED, LanguageProbe
from tunery.training.sequences import SequenceSet, read_row_sequences


@dataclass(frozen=True)
class PairSet:
    """Preference pairs: of each, the chosen sequence and then the rejected one."""

    sequences: SequenceSet

    def __len__(self) -> int:
        return len(self.sequences) // 2

    @property
    def lengths(self) -> Integers:
        """(pairs,) tokens of both sequences."""
        both: Integers = self.sequences.lengths.reshape(-1, 2).sum(axis=1)
        return both

    @property
    def part_sizes(self) -> list[int]:
        """Pairs of each data stage."""
        return [size // 2 for size in self.sequences.part_sizes]

    @property
    def part_stats(self) -> list[TokenStats]:
        return self.sequences.part_stats

    def sides(self, pairs: Sequence[int]) -> list[int]:
        """Indices of the chosen sequences, and after them the rejected ones."""
        return [*(2 * pair for pair in pairs), *(2 * pair + 1 for pair in pairs)]


class DpoTask:
    """The recipe of `dpo`."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError when no pair can be learned from, or none of eval_data measured."""
        assert isinstance(job.spec, Dpo)
        self._job, self._spec = job, job.spec
        self._policy = Policy(job, rank)
        data, evaluated = read_row_sequences(job, self._policy.tokenizer)
        self._data, self._evaluated = PairSet(data), PairSet(evaluated)
        self.examples = self._data

    def trainer(self, arguments: dict[str, Any], order: Integers, steps: TrainerCallback) -> DpoTrainer:
        # Under ZeRO-3 these make transformers shard the models while they load.
        # TRL 1.16 has no reference_free any more, and loads a reference unless it has been asked beforehand.
        free = self._spec.reference_free
        settings = DPOConfig(**arguments, **SETTINGS, beta=self._spec.beta, precompute_ref_log_probs=free)
        return DpoTrainer(
            **self._policy.arguments(),
            spec=self._spec,
            ref_model=None if free else self._policy.second_copy(),
            args=settings,
            train_dataset=indices(order),
            data_collator=lambda rows: self._collate(self._data, [row["index"] for row in rows]),
            eval_lengths=self._evaluated.lengths,
            collate_evaluated=lambda batch: self._collate(self._evaluated, batch),
            callbacks=[steps],
        )

    def save(self, trainer: DpoTrainer) -> None:
        self._policy.save(trainer)

    def probe(self, parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, self._data.sequences.first(2 * PROBED)[::2], parameters)

    def counted(self) -> dict[str, Any]:
        evaluated = self._evaluated.sequences.stats
        return {
            **self._data.sequences.facts(),
            "sequences": len(self._data),
            "eval_rows": evaluated.rows,
            "eval_unusable": evaluated.num_unusable,
        }

    def found(self, trainer: DpoTrainer) -> dict[str, Any]:
        """eval_accuracy, eval_margin: at the end."""
        return {name: trainer.metrics_at_end.get(name) for name in ("eval_accuracy", "eval_margin")}

    def _collate(self, pairs: PairSet, batch: Sequence[int]) -> dict[str, torch.Tensor]:
        """The chosen sequences, and after them the rejected ones."""
        data = pairs.sequences
        return padded(
            [(data.ids(row), data.labels(row)) for row in pairs.sides(batch)], self._policy.tokenizer.pad_token_id
        )


class DpoTrainer(ReferenceLogProbs, DPOTrainer):  # type: ignore[misc]  # trl ships no types
    """With our data order, losses of each pair, and an exact evaluation.

    TRL 1.16 drops the smoothing of its sigmoid loss (`label_smoothing` only acts in others), and gives means of batches
    alone: so the losses are worked out here.
    """

    def __init__(
        self,
        *,
        spec: Dpo,
        eval_lengths: Integers,
        collate_evaluated: Callable[[list[int]], dict[str, torch.Tensor]],
        **arguments: Any,
    ) -> None:
        self._spec, self.reference_free = spec, spec.reference_free
        self._eval_lengths, self._collate_evaluated = eval_lengths, collate_evaluated
        super().__init__(**arguments)

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The mean over pairs: so micro batches and workers add up to the same, however cut."""
        losses, margins = self._measure(model, inputs).unbind(dim=1)
        margins = self.accelerator.gather(margins.detach())
        self._metrics["train"]["margin"].append(margins.mean().item())
        self._metrics["train"]["accuracy"].append(preference_accuracy(margins.double().cpu().numpy()))
        return losses.mean()

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Of the whole set: eval_loss (nats a pair), eval_accuracy (share of the pairs whose chosen answer has the
        larger implicit reward, ties half), eval_margin (mean difference of the two rewards)."""

        def measure(batch: list[int]) -> torch.Tensor:
            return self._measure(self.model_wrapped, self._prepare_inputs(self._collate_evaluated(batch)))

        size = self.args.per_device_eval_batch_size
        losses, margins = self.measured(self._eval_lengths, 2, measure, size).unbind(dim=1)
        return self.told(
            {
                "eval_loss": losses.mean().item(),
                "eval_accuracy": preference_accuracy(margins.cpu().numpy()),
                "eval_margin": margins.mean().item(),
            }
        )

    def _measure(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """(pairs, 2): loss and margin."""
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
    """(pairs,) in nats, from the log ratios of both answers, (pairs,), and their tokens.

    sigmoid, with label smoothing e: -(1 - e) log s(b d) - e log s(-b d), d = chosen - rejected (cDPO:
    https://ericmitchell.ai/cdpo.pdf). hinge: max(0, 1 - b d). ipo: (d - 1 / 2b)^2 with ratios per token, as its authors
    confirmed to TRL.
    """
    margins = spec.beta * (chosen - rejected)
    if spec.loss == "hinge":
        return torch.relu(1 - margins)
    if spec.loss == "ipo":
        return (chosen / chosen_tokens - rejected / rejected_tokens - 1 / (2 * spec.beta)) ** 2
    wrong = spec.label_smoothing
    return -(1 - wrong) * logsigmoid(margins) - wrong * logsigmoid(-margins)
