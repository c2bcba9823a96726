"""`dpo`: direct preference optimization on pairs (Rafailov et al. 2023, https://arxiv.org/abs/2305.18290), by TRL's
DPOTrainer.

What an answer is worth, its implicit reward, is beta x (log p under the model - log p under the reference), summed over
its tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch.nn.functional import logsigmoid
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import DPOConfig, DPOTrainer

from tunery.errors import StageError
from tunery.models.encode import encode
from tunery.models.metrics import preference_accuracy
from tunery.spec import Dpo
from tunery.store.rows import CONTENT, Row
from tunery.train.job import Job, rows_of
from tunery.train.policy import Policy
from tunery.train.reference import SETTINGS, AgainstReference, Tokens, in_batches, padded, rejected_side, tokens_of
from tunery.train.reload_check import LanguageProbe

COLUMNS = [*CONTENT, "rejected"]


@dataclass
class Pairs:
    """Preference pairs as tokens."""

    chosen: list[Tokens] = field(default_factory=list)
    rejected: list[Tokens] = field(default_factory=list)
    rows: int = 0
    truncated: int = 0
    """Pairs with an answer that was cut."""
    unusable: int = 0
    """Rows that are no pairs, pairs with an answer of which nothing is left, and pairs that are the same when cut."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of both sequences of each pair."""
        return [
            len(chosen) + len(rejected) for (chosen, _), (rejected, _) in zip(self.chosen, self.rejected, strict=True)
        ]

    def dataset(self) -> Dataset:
        return Dataset.from_dict(
            {
                "chosen": [ids for ids, _ in self.chosen],
                "chosen_answer": [answer for _, answer in self.chosen],
                "rejected": [ids for ids, _ in self.rejected],
                "rejected_answer": [answer for _, answer in self.rejected],
            }
        )


def pairs_of(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Pairs:
    """Both answers after the same turns, as sft would see them."""
    pairs = Pairs()
    for some in in_batches(rows):
        pairs.rows += len(some)
        whole = [row for row in some if row["messages"] and row["rejected"]]
        other = [rejected_side(row) for row in whole]
        sides = (encode(whole, tokenizer, max_length), encode(other, tokenizer, max_length))
        for chosen, rejected in zip(*sides, strict=True):
            if chosen.counted and rejected.counted and chosen.ids != rejected.ids:
                pairs.chosen.append(tokens_of(chosen))
                pairs.rejected.append(tokens_of(rejected))
                pairs.truncated += chosen.truncated or rejected.truncated
    pairs.unusable = pairs.rows - len(pairs.chosen)
    return pairs


class Preference:
    """The recipe of `dpo`."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError when no pair can be learned from, or none of eval_data measured."""
        assert isinstance(job.spec, Dpo)
        self._job, self._spec = job, job.spec
        self._policy = Policy(job, rank)
        self._data = self._pairs(job.rows, "data")
        self._measured = self._pairs(job.eval_rows, "eval_data") if job.eval_rows else Pairs()
        self.lengths = self._data.lengths

    def trainer(self, arguments: dict[str, Any], order: list[int], steps: TrainerCallback) -> DpoTrainer:
        # Under ZeRO-3 these make transformers shard the models while they load.
        # TRL 1.16 has no reference_free any more, and loads a reference unless it has been asked beforehand.
        free = self._spec.reference_free
        settings = DPOConfig(**arguments, **SETTINGS, beta=self._spec.beta, precompute_ref_log_probs=free)
        return DpoTrainer(
            **self._policy.arguments(),
            spec=self._spec,
            ref_model=None if free else self._policy.second_copy(),
            args=settings,
            train_dataset=self._data.dataset().select(order),
            eval_dataset=self._measured.dataset() if self._job.eval_rows else None,
            data_collator=self._collate,
            callbacks=[steps],
        )

    def save(self, trainer: DpoTrainer) -> None:
        self._policy.save(trainer)

    def probe(self, parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, [ids for ids, _ in self._data.chosen], parameters)

    def counted(self) -> dict[str, Any]:
        data = self._data
        return {
            "rows": data.rows,
            "sequences": len(data.chosen),
            "truncated": data.truncated,
            "unusable": data.unusable,
            "eval_rows": self._measured.rows,
        }

    def found(self, trainer: DpoTrainer) -> dict[str, Any]:
        """eval_accuracy, eval_margin: at the end."""
        return {name: trainer.metrics_at_end.get(name) for name in ("eval_accuracy", "eval_margin")}

    def _pairs(self, sources: Sequence[Any], named: str) -> Pairs:
        pairs = pairs_of(rows_of(sources, COLUMNS), self._policy.tokenizer, self._spec.max_length)
        if not pairs.chosen:
            raise StageError(
                self._job.stage,
                f"none of the {pairs.rows:,} rows of `{named}` is a preference pair that can be learned from",
                cause=f"they have no rejected answer, or nothing of the answers is left within max_length "
                f"({self._spec.max_length}), or the same of both",
                remedy="give rows with `chosen` and `rejected` (docs/data.md), or a larger max_length",
            )
        return pairs

    def _collate(self, batch: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The chosen sequences, and after them the rejected ones."""
        sequences = [(row[side], row[f"{side}_answer"]) for side in ("chosen", "rejected") for row in batch]
        return padded(sequences, self._policy.tokenizer.pad_token_id)


class DpoTrainer(AgainstReference, DPOTrainer):  # type: ignore[misc]  # trl ships no types
    """With our data order, losses of each pair, and an exact evaluation.

    TRL 1.16 drops the smoothing of its sigmoid loss (`label_smoothing` only acts in others), and gives means of batches
    alone: so the losses are worked out here.
    """

    def __init__(self, *, spec: Dpo, **arguments: Any) -> None:
        self._spec, self.reference_free = spec, spec.reference_free
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
        rows = list(self.eval_dataset)
        lengths = [max(len(row["chosen"]), len(row["rejected"])) for row in rows]

        def measure(batch: list[int]) -> torch.Tensor:
            inputs = self._prepare_inputs(self.data_collator([rows[index] for index in batch]))
            return self._measure(self.model_wrapped, inputs)

        size = self.args.per_device_eval_batch_size
        losses, margins = self.measured(lengths, 2, measure, size).unbind(dim=1)
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
