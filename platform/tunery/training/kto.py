"""`kto`: Kahneman-Tversky optimization on responses labelled as desirable or undesirable (Ethayarajh et al. 2024,
https://arxiv.org/abs/2402.01306), by TRL's KTOTrainer.

The loss of a response compares its log ratio r = log p under the policy - log p under the reference with a KL estimate
z. It is w sigmoid(-beta (r - z)) for a desirable response and w sigmoid(-beta (z - r)) for an undesirable one, with the
weight w of its kind.

z is the mean log ratio of mismatched responses (each after the prompt of another row), at least 0, without a gradient.
It is estimated from the rows of one optimizer step. It depends on `global_batch_size` and is noisy for small batches,
but does not depend on workers and micro batches (TRL 1.16 estimates it per micro batch, and rejects micro batches of
one row). In an evaluation z is estimated from the complete set.
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
from tunery.training.reference_log_probs import TRL_SETTINGS, ReferenceLogProbsMixin
from tunery.training.reload_check import NUM_PROBE_CANDIDATES, LanguageProbe
from tunery.training.sequences import SequenceSet, read_row_sequences

MAX_SHIFTS = 64
"""Maximum number of shifts that `mismatch` tries."""
MISMATCHED = "mismatched_"
"""Prefix of the model inputs with mismatched responses in a batch."""


@dataclass(frozen=True)
class RatedResponses:
    """Prompts, each with a response that is labelled 1 (desirable) or 0 (undesirable)."""

    sequences: SequenceSet
    max_length: int

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def num_desirable(self) -> int:
        return int((self.sequences.row_labels == 1).sum())

    @property
    def num_undesirable(self) -> int:
        return len(self) - self.num_desirable

    def mismatches(self, order: Sequence[int], batch_size: int) -> list[int]:
        """For each index in `order`, return the index of the row whose response is its mismatched response. Both are in
        the same batch of `order`."""
        return [
            int(order[start + other])
            for start in range(0, len(order), batch_size)
            for other in mismatch([self._prompt_hash(int(index)) for index in order[start : start + batch_size]])
        ]

    def sequence(self, index: int) -> tuple[list[int], list[int]]:
        """Return ids and labels."""
        return self.sequences.ids(index), self.sequences.labels(index)

    def mismatched_sequence(self, index: int, other: int) -> tuple[list[int], list[int]]:
        """Return ids and labels of the prompt of row `index` with the response of row `other`."""
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


def mismatch(prompts: Sequence[object]) -> list[int]:
    """For each prompt, return the index of the prompt whose response becomes its mismatched response.

    The responses are shifted cyclically, so that each is used once. The shift is the smallest one that gives no prompt
    the response of an equal prompt, or the one with the fewest such cases.
    """
    count = len(prompts)

    def num_equal(shift: int) -> int:
        return sum(prompts[index] == prompts[index - shift] for index in range(count))

    shifts = range(1, min(count, MAX_SHIFTS + 1))
    best = next((shift for shift in shifts if not num_equal(shift)), None)
    if best is None:
        best = min(shifts, key=num_equal, default=0)
    return [(index - best) % count for index in range(count)]


class KtoTask:
    """The training task of `kto`."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError if `data` or `eval_data` does not have both desirable and undesirable responses."""
        assert isinstance(job.spec, Kto)
        self._job, self._spec = job, job.spec
        self._policy = Policy(job, rank)
        data, eval_data = read_row_sequences(job, self._policy.tokenizer)
        self.responses = self._labelled_responses(data, "data")
        self._eval_responses = self._labelled_responses(eval_data, "eval_data")
        self.examples = data

    def build_trainer(self, arguments: dict[str, Any], order: Integers, callback: TrainerCallback) -> KtoTrainer:
        # Construct the arguments before loading the models: under ZeRO-3 they make transformers shard them.
        spec, eval_responses = self._spec, self._eval_responses
        config = KTOConfig(
            **arguments,
            **TRL_SETTINGS,
            # KtoTrainer computes z and the loss itself. Only for this loss does TRL 1.16 estimate no z and accept micro
            # batches of one row.
            loss_type="apo_zero_unpaired",
        )
        assert spec.global_batch_size != "auto", "resolved before the job starts"
        mismatches = self.responses.mismatches(order.tolist(), spec.global_batch_size)
        eval_indices = list(range(len(eval_responses)))
        return KtoTrainer(
            **self._policy.trainer_arguments(),
            spec=spec,
            ref_model=self._policy.reference_model(),
            args=config,
            train_dataset=Dataset.from_dict({"index": order, "mismatch": mismatches}),
            data_collator=lambda rows: self._collate(
                self.responses, [row["index"] for row in rows], [row["mismatch"] for row in rows]
            ),
            eval_lengths=eval_responses.sequences.lengths,
            eval_mismatches=eval_responses.mismatches(eval_indices, max(1, len(eval_indices))),
            collate_eval=lambda batch, mismatches: self._collate(eval_responses, batch, mismatches),
            callbacks=[callback],
        )

    def save(self, trainer: KtoTrainer) -> None:
        self._policy.save(trainer)

    def probe(self, num_parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, self.responses.sequences.first(NUM_PROBE_CANDIDATES), num_parameters)

    def data_stats(self) -> dict[str, Any]:
        return {
            **self.responses.sequences.facts(),
            "wanted": self.responses.num_desirable,
            "unwanted": self.responses.num_undesirable,
            "eval_rows": self._eval_responses.sequences.stats.rows,
            "eval_unusable": self._eval_responses.sequences.stats.num_unusable,
        }

    def final_metrics(self, trainer: KtoTrainer) -> dict[str, Any]:
        """Return eval_margin of the last evaluation."""
        return {"eval_margin": trainer.last_eval_metrics.get("eval_margin")}

    def _labelled_responses(self, sequences: SequenceSet, field: str) -> RatedResponses:
        responses = RatedResponses(sequences, self._spec.max_length)
        if sequences.parts and not (responses.num_desirable and responses.num_undesirable):
            raise StageError(
                self._job.stage,
                f"the {sequences.stats.rows:,} rows of `{field}` give {responses.num_desirable:,} desirable and "
                f"{responses.num_undesirable:,} undesirable responses",
                cause="KTO needs both desirable (`label: true`) and undesirable responses"
                + (f"; {sequences.stats.num_unusable:,} rows are unusable" if sequences.stats.num_unusable else ""),
                remedy="give rows with `label` true and false, or preference pairs (docs/data.md)",
            )
        return responses

    def _collate(
        self, data: RatedResponses, batch: Sequence[int], mismatches: Sequence[int]
    ) -> dict[str, torch.Tensor]:
        """Return the padded sequences of a batch, the same with mismatched responses (names begin with `mismatched_`),
        and `desirable`, (rows,) bool."""
        pad = self._policy.tokenizer.pad_token_id
        matched = pad_batch([data.sequence(index) for index in batch], pad)
        mismatched = pad_batch([data.mismatched_sequence(*pair) for pair in zip(batch, mismatches, strict=True)], pad)
        desirable = torch.tensor([bool(data.sequences.row_labels[index] == 1) for index in batch])
        return {**matched, **{MISMATCHED + name: values for name, values in mismatched.items()}, "desirable": desirable}


class KtoTrainer(ReferenceLogProbsMixin, KTOTrainer):  # type: ignore[misc]  # trl ships no types
    """TRL's KTOTrainer with a fixed data order, z per optimizer step and an exact evaluation."""

    def __init__(
        self,
        *,
        spec: Kto,
        eval_lengths: Integers,
        eval_mismatches: Sequence[int],
        collate_eval: Callable[[list[int], list[int]], dict[str, torch.Tensor]],
        **arguments: Any,
    ) -> None:
        self._spec = spec
        self._eval_lengths, self._eval_mismatches = eval_lengths, eval_mismatches
        self._collate_eval = collate_eval
        self._rewards_since_log: list[torch.Tensor] = []
        """(rows, 2) each: implicit reward, and whether the response is desirable (1 or 0)."""
        super().__init__(**arguments)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, torch.Tensor]], Any]:
        """Return the micro batches of an optimizer step, with z of the step added to each, and the number of items in
        them."""
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        with torch.no_grad(), self.compute_loss_context_manager():
            ratios = [self.log_ratios(self.model_wrapped, _mismatched_inputs(batch)) for batch in batches]
        z = kl_estimate(self.accelerator.gather(torch.cat(ratios)))
        self._metrics["train"]["kl"].append(z.item())
        return [{**batch, "z": z} for batch in batches], num_items

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return the mean loss over rows. It does not depend on the micro batch size or the number of workers."""
        ratios, desirable = self.log_ratios(model, inputs), inputs["desirable"]
        rewards = self._spec.beta * ratios.detach()
        self._rewards_since_log.append(
            self.accelerator.gather(torch.stack([rewards, desirable.to(rewards.dtype)], dim=1))
        )
        return response_losses(self._spec, ratios, desirable, inputs["z"]).mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and self._rewards_since_log:
            rewards, desirable = torch.cat(self._rewards_since_log).unbind(dim=1)
            if (margin := reward_margin(rewards, desirable > 0)) is not None:
                logs["margin"] = margin
            self._rewards_since_log.clear()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the metrics of the complete evaluation set.

        eval_loss: mean loss per response, each between 0 and the weight of its kind; eval_margin: mean implicit reward
        of desirable responses minus that of undesirable ones.
        """

        def evaluate_batch(batch: list[int]) -> torch.Tensor:
            batch_inputs = self._collate_eval(batch, [self._eval_mismatches[index] for index in batch])
            inputs = self._prepare_inputs(batch_inputs)
            return torch.stack(
                [
                    self.log_ratios(self.model_wrapped, inputs),
                    self.log_ratios(self.model_wrapped, _mismatched_inputs(inputs)),
                    inputs["desirable"].float(),
                ],
                dim=1,
            )

        ratios, mismatched_ratios, labels = self.evaluate_rows(self._eval_lengths, 3, evaluate_batch).unbind(dim=1)
        desirable = labels > 0
        margin = reward_margin(self._spec.beta * ratios, desirable)
        assert margin is not None, "eval_data has both labels"
        losses = response_losses(self._spec, ratios, desirable, kl_estimate(mismatched_ratios))
        return self.report_metrics({"eval_loss": losses.mean().item(), "eval_margin": margin})


def _mismatched_inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix(MISMATCHED): values for name, values in batch.items() if name.startswith(MISMATCHED)}


def kl_estimate(mismatched_ratios: torch.Tensor) -> torch.Tensor:
    """Return z, a scalar in nats, from the log ratios of mismatched responses, (responses,)."""
    return mismatched_ratios.mean().clamp(min=0)


def response_losses(spec: Kto, ratios: torch.Tensor, desirable: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """KTO losses, (responses,), by equations 7 and 8 of the paper.

    ratios: log ratios in nats, (responses,); desirable: (responses,) bool; z: scalar in nats.
    """
    advantages = torch.where(desirable, ratios - z, z - ratios)
    weights = torch.where(desirable, spec.desirable_weight, spec.undesirable_weight)
    return weights * (1 - torch.sigmoid(spec.beta * advantages))


def reward_margin(rewards: torch.Tensor, desirable: torch.Tensor) -> float | None:
    """Mean reward of desirable responses minus that of undesirable ones; None if one kind is missing."""
    if desirable.all() or not desirable.any():
        return None
    return float(rewards[desirable].mean() - rewards[~desirable].mean())
