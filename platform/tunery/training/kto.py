"""`kto`: Kahneman-Tversky optimization on responses labelled as desirable or undesirable (Ethayarajh et al. 2024,
https://arxiv.org/abs/2402.01306), by TRL's KTOTrainer.

A response's log ratio r = log p under the model - log p under the reference is compared with the KL baseline z: the
mean log ratio of mismatched responses (each after the prompt of another row), at least 0, without a gradient. The loss
is w (1 - s(b (r - z))) for a desirable response and w (1 - s(b (z - r))) for an undesirable one.

z is estimated from the rows of one optimizer step, each prompt with the response of another row. It depends on
`global_batch_size` and is noisy for small batches, but does not depend on workers and micro batches (TRL 1.16 estimates
it per micro batch, and rejects micro batches of one row). In an evaluation z is computed over the complete set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import KTOConfig, KTOTrainer

from tunery.errors import StageError
from tunery.models.tokenized_dataset import Integers
from tunery.spec import Kto
from tunery.training.distributed_eval import pad_batch
from tunery.training.job import Job
from tunery.training.policy import Policy
from tunery.training.reference_log_probs import SETTINGS, ReferenceLogProbs
from tunery.training.reload_check import PROBED, LanguageProbe
from tunery.training.sequences import SequenceSet, read_row_sequences

MAX_SHIFTS = 64
"""Number of shifts that `mismatched` tries."""


@dataclass(frozen=True)
class RatedResponses:
    """Responses with a label: 1 desirable, 0 undesirable."""

    sequences: SequenceSet
    max_length: int

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def counts(self) -> dict[str, int]:
        wanted = int((self.sequences.row_labels == 1).sum())
        return {"wanted": wanted, "unwanted": len(self) - wanted}

    def partners(self, order: Sequence[int], group: int) -> list[int]:
        """For each index in `order`, the index whose response follows its prompt as a mismatch, within each `group`."""
        return [
            int(order[start + other])
            for start in range(0, len(order), group)
            for other in mismatched([self._prompt_hash(int(index)) for index in order[start : start + group]])
        ]

    def sequence(self, index: int) -> tuple[list[int], list[int]]:
        """Return ids and labels."""
        return self.sequences.ids(index), self.sequences.labels(index)

    def mismatched_sequence(self, index: int, other: int) -> tuple[list[int], list[int]]:
        """Return ids and labels of the prompt of `index` with the response of `other`."""
        prompt = list(self._prompt(index))
        response = self.sequences.ids(other)[self._response_start(other) :]
        return (prompt + response)[: self.max_length], ([-100] * len(prompt) + response)[: self.max_length]

    def _response_start(self, index: int) -> int:
        return self.sequences.spans(index)[0][0]

    def _prompt_hash(self, index: int) -> bytes:
        ids = np.array(self._prompt(index), np.uint32)
        return hashlib.blake2b(ids.tobytes(), digest_size=8).digest()

    def _prompt(self, index: int) -> tuple[int, ...]:
        return tuple(self.sequences.ids(index)[: self._response_start(index)])


def mismatched(prompts: Sequence[object]) -> list[int]:
    """For each prompt, return the index of the prompt whose response it gets.

    Responses are shifted cyclically, so that each is used once: by the smallest shift that gives no prompt the response
    of an equal prompt, or else the one with the fewest such matches.
    """
    count = len(prompts)

    def num_matches(shift: int) -> int:
        return sum(prompts[index] == prompts[index - shift] for index in range(count))

    shifts = range(1, min(count, MAX_SHIFTS + 1))
    best = next((shift for shift in shifts if not num_matches(shift)), None)
    if best is None:
        best = min(shifts, key=num_matches, default=0)
    return [(index - best) % count for index in range(count)]


class KtoTask:
    """The trainer adapter of `kto`."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError if `data` or `eval_data` does not have both desirable and undesirable responses."""
        assert isinstance(job.spec, Kto)
        self._job, self._spec = job, job.spec
        self._policy = Policy(job, rank)
        data, eval_data = read_row_sequences(job, self._policy.tokenizer)
        self.responses = self._labelled_responses(data, "data")
        self._eval_responses = self._labelled_responses(eval_data, "eval_data")
        self.examples = data

    def trainer(self, arguments: dict[str, Any], order: Integers, callback: TrainerCallback) -> KtoTrainer:
        # Before the models are loaded: under ZeRO-3 the arguments make transformers shard them while they load.
        spec, eval_responses = self._spec, self._eval_responses
        settings = KTOConfig(
            **arguments,
            **SETTINGS,
            # z and the loss are computed here. This is the one loss for which TRL 1.16 estimates no z, and so allows
            # micro batches of one row.
            loss_type="apo_zero_unpaired",
        )
        assert spec.global_batch_size != "auto", "resolved by the launcher"
        all_indices = list(range(len(eval_responses)))
        return KtoTrainer(
            **self._policy.arguments(),
            spec=spec,
            ref_model=self._policy.reference_model(),
            args=settings,
            train_dataset=Dataset.from_dict(
                {"index": order, "other": self.responses.partners(order.tolist(), spec.global_batch_size)}
            ),
            data_collator=lambda rows: self._collate(
                self.responses, [row["index"] for row in rows], [row["other"] for row in rows]
            ),
            eval_lengths=eval_responses.sequences.lengths,
            eval_partners=eval_responses.partners(all_indices, max(1, len(all_indices))),
            collate_eval=lambda batch, others: self._collate(eval_responses, batch, others),
            callbacks=[callback],
        )

    def save(self, trainer: KtoTrainer) -> None:
        self._policy.save(trainer)

    def probe(self, parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, self.responses.sequences.first(PROBED), parameters)

    def data_stats(self) -> dict[str, Any]:
        return {
            **self.responses.sequences.facts(),
            **self.responses.counts,
            "eval_rows": self._eval_responses.sequences.stats.rows,
            "eval_unusable": self._eval_responses.sequences.stats.num_unusable,
        }

    def final_metrics(self, trainer: KtoTrainer) -> dict[str, Any]:
        """eval_margin of the last evaluation."""
        return {"eval_margin": trainer.last_eval_metrics.get("eval_margin")}

    def _labelled_responses(self, sequences: SequenceSet, field: str) -> RatedResponses:
        responses = RatedResponses(sequences, self._spec.max_length)
        if sequences.parts and 0 in (counts := responses.counts).values():
            both_counts = " and ".join(f"{count:,} {name}" for name, count in counts.items())
            raise StageError(
                self._job.stage,
                f"the {sequences.stats.rows:,} rows of `{field}` give {both_counts} responses",
                cause="KTO needs both desirable (`label: true`) and undesirable responses"
                + (f"; {sequences.stats.num_unusable:,} rows are unusable" if sequences.stats.num_unusable else ""),
                remedy="give rows with `label` true and false, or preference pairs (docs/data.md)",
            )
        return responses

    def _collate(self, data: RatedResponses, batch: Sequence[int], others: Sequence[int]) -> dict[str, torch.Tensor]:
        """Batch of the sequences, of the mismatched sequences as `other_..`, and of `wanted`, (rows,) bool: True for
        desirable responses."""
        pad = self._policy.tokenizer.pad_token_id
        own = pad_batch([data.sequence(index) for index in batch], pad)
        other = pad_batch([data.mismatched_sequence(*pair) for pair in zip(batch, others, strict=True)], pad)
        wanted = torch.tensor([bool(data.sequences.row_labels[index] == 1) for index in batch])
        return {**own, **{f"other_{name}": values for name, values in other.items()}, "wanted": wanted}


class KtoTrainer(ReferenceLogProbs, KTOTrainer):  # type: ignore[misc]  # trl ships no types
    """TRL's KTOTrainer with a fixed data order, z per optimizer step and an exact evaluation."""

    def __init__(
        self,
        *,
        spec: Kto,
        eval_lengths: Integers,
        eval_partners: Sequence[int],
        collate_eval: Callable[[list[int], list[int]], dict[str, torch.Tensor]],
        **arguments: Any,
    ) -> None:
        self._spec = spec
        self._eval_lengths, self._eval_partners = eval_lengths, eval_partners
        self._collate_eval = collate_eval
        self._rewards_since_log: list[torch.Tensor] = []
        """(rows, 2) each: implicit reward, and 1 for a desirable response."""
        super().__init__(**arguments)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, torch.Tensor]], Any]:
        """Return the micro batches of a step, with the step's z added to each."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        with torch.no_grad(), self.compute_loss_context_manager():
            ratios = [self.log_ratios(self.model_wrapped, _mismatched_inputs(batch)) for batch in batches]
        z = baseline(self.accelerator.gather(torch.cat(ratios)))
        self._metrics["train"]["kl"].append(z.item())
        return [{**batch, "z": z} for batch in batches], items

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Mean loss over rows, which does not depend on the micro batch size or the number of workers."""
        ratios, wanted = self.log_ratios(model, inputs), inputs["wanted"]
        rewards = self._spec.beta * ratios.detach()
        self._rewards_since_log.append(self.accelerator.gather(torch.stack([rewards, wanted.to(rewards.dtype)], dim=1)))
        return response_losses(self._spec, ratios, wanted, inputs["z"]).mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and self._rewards_since_log:
            rewards, wanted = torch.cat(self._rewards_since_log).unbind(dim=1)
            if (difference := margin(rewards, wanted > 0)) is not None:
                logs["margin"] = difference
            self._rewards_since_log.clear()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the complete set: eval_loss (per response, from 0 to its weight), eval_margin (mean implicit reward
        of desirable responses minus that of undesirable ones)."""

        def evaluate_batch(batch: list[int]) -> torch.Tensor:
            batch_inputs = self._collate_eval(batch, [self._eval_partners[index] for index in batch])
            inputs = self._prepare_inputs(batch_inputs)
            return torch.stack(
                [
                    *(self.log_ratios(self.model_wrapped, part) for part in (inputs, _mismatched_inputs(inputs))),
                    inputs["wanted"].float(),
                ],
                dim=1,
            )

        ratios, others, labels = self.evaluate_rows(self._eval_lengths, 3, evaluate_batch).unbind(dim=1)
        wanted = labels > 0
        difference = margin(self._spec.beta * ratios, wanted)
        assert difference is not None, "eval_data has both labels"
        losses = response_losses(self._spec, ratios, wanted, baseline(others))
        return self.report_metrics({"eval_loss": losses.mean().item(), "eval_margin": difference})


def _mismatched_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("other_"): values for name, values in batch.items() if name.startswith("other_")}


def baseline(ratios: torch.Tensor) -> torch.Tensor:
    """Return z, a scalar in nats, from the log ratios of mismatched responses."""
    return ratios.mean().clamp(min=0)


def response_losses(spec: Kto, ratios: torch.Tensor, wanted: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """KTO losses, (responses,), by equations 7 and 8 of the paper. ratios: in nats; wanted: bool."""
    advantages = torch.where(wanted, ratios - z, z - ratios)
    weights = torch.where(wanted, spec.desirable_weight, spec.undesirable_weight)
    return weights * (1 - torch.sigmoid(spec.beta * advantages))


def margin(rewards: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """Mean reward of desirable responses minus that of undesirable ones; None if one kind is missing."""
    if wanted.all() or not wanted.any():
        return None
    return float(rewards[wanted].mean() - rewards[~wanted].mean())
