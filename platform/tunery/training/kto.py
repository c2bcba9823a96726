"""`kto`: Kahneman-Tversky optimization on answers that are known to be wanted or not (Ethayarajh et al. 2024,
https://arxiv.org/abs/2402.01306), by TRL's KTOTrainer.

An answer's log ratio r = log p under the model - log p under the reference is compared with z, how far the model has
moved from the reference at all: the mean log ratio of answers after prompts that they do not belong to, at least 0, a
constant for the gradient. The loss is w (1 - s(b (r - z))) for a wanted answer and w (1 - s(b (z - r))) for an unwanted
one.

z is estimated from the rows of one optimizer step, each prompt with the answer of another of them. So it depends on
`global_batch_size`, and a step of few rows knows it badly; it does not depend on workers and micro batches (TRL 1.16
takes it from a micro batch, and refuses those of one row). In an evaluation it is that of the whole held-out set.
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
from tunery.training.job import Job
from tunery.training.policy import Policy
from tunery.training.reference_log_probs import SETTINGS, ReferenceLogProbs, padded
from tunery.training.reload_check import PROBED, LanguageProbe
from tunery.training.sequences import SequenceSet, read_row_sequences

SHIFTS = 64
"""So many ways to hand answers on are looked at."""


@dataclass(frozen=True)
class RatedResponses:
    """Rated answers: sequences with a label."""

    sequences: SequenceSet
    max_length: int

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def counts(self) -> dict[str, int]:
        wanted = int((self.sequences.row_labels == 1).sum())
        return {"wanted": wanted, "unwanted": len(self) - wanted}

    def partners(self, order: Sequence[int], group: int) -> list[int]:
        """For each of `order` the one whose answer it is handed, within each `group` of them."""
        return [
            int(order[start + other])
            for start in range(0, len(order), group)
            for other in mismatched([self._prompt_hash(int(index)) for index in order[start : start + group]])
        ]

    def sequence(self, index: int) -> tuple[list[int], list[int]]:
        """Ids and labels."""
        return self.sequences.ids(index), self.sequences.labels(index)

    def with_answer_of(self, index: int, other: int) -> tuple[list[int], list[int]]:
        """The same of the prompt of `index` with the answer of `other`."""
        prompt = list(self._prompt(index))
        answer = self.sequences.ids(other)[self._start(other) :]
        return (prompt + answer)[: self.max_length], ([-100] * len(prompt) + answer)[: self.max_length]

    def _start(self, index: int) -> int:
        return self.sequences.spans(index)[0][0]

    def _prompt_hash(self, index: int) -> bytes:
        ids = np.array(self._prompt(index), np.uint32)
        return hashlib.blake2b(ids.tobytes(), digest_size=8).digest()

    def _prompt(self, index: int) -> tuple[int, ...]:
        return tuple(self.sequences.ids(index)[: self._start(index)])


def mismatched(prompts: Sequence[object]) -> list[int]:
    """For each prompt another one, whose answer it is handed: all are handed on by the same number of places, so that
    each answer is used once, and by the first number by which none comes to a prompt like its own."""
    count = len(prompts)

    def own(shift: int) -> int:
        return sum(prompts[place] == prompts[place - shift] for place in range(count))

    shifts = range(1, min(count, SHIFTS + 1))
    best = next((shift for shift in shifts if not own(shift)), None)
    if best is None:
        best = min(shifts, key=own, default=0)
    return [(place - best) % count for place in range(count)]


class KtoTask:
    """The recipe of `kto`."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError when there are not both wanted and unwanted answers in the rows, or in those of
        eval_data."""
        assert isinstance(job.spec, Kto)
        self._job, self._spec = job, job.spec
        self._policy = Policy(job, rank)
        data, evaluated = read_row_sequences(job, self._policy.tokenizer)
        self.answers, self._measured = self._answers(data, "data"), self._answers(evaluated, "eval_data")
        self.examples = data

    def trainer(self, arguments: dict[str, Any], order: Integers, steps: TrainerCallback) -> KtoTrainer:
        # Under ZeRO-3 these make transformers shard the models while they load.
        spec, measured = self._spec, self._measured
        settings = KTOConfig(
            **arguments,
            **SETTINGS,
            # z and the loss are worked out here: TRL 1.16 estimates no z for this one loss, and so allows micro batches
            # of one row.
            loss_type="apo_zero_unpaired",
        )
        assert spec.global_batch_size != "auto", "resolved by the launcher"
        everything = list(range(len(measured)))
        return KtoTrainer(
            **self._policy.arguments(),
            spec=spec,
            ref_model=self._policy.second_copy(),
            args=settings,
            train_dataset=Dataset.from_dict(
                {"index": order, "other": self.answers.partners(order.tolist(), spec.global_batch_size)}
            ),
            data_collator=lambda rows: self._collate(
                self.answers, [row["index"] for row in rows], [row["other"] for row in rows]
            ),
            eval_lengths=measured.sequences.lengths,
            eval_partners=measured.partners(everything, max(1, len(everything))),
            collate_evaluated=lambda batch, others: self._collate(measured, batch, others),
            callbacks=[steps],
        )

    def save(self, trainer: KtoTrainer) -> None:
        self._policy.save(trainer)

    def probe(self, parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, self.answers.sequences.first(PROBED), parameters)

    def counted(self) -> dict[str, Any]:
        return {
            **self.answers.sequences.facts(),
            **self.answers.counts,
            "eval_rows": self._measured.sequences.stats.rows,
            "eval_unusable": self._measured.sequences.stats.num_unusable,
        }

    def found(self, trainer: KtoTrainer) -> dict[str, Any]:
        """eval_margin: at the end."""
        return {"eval_margin": trainer.metrics_at_end.get("eval_margin")}

    def _answers(self, sequences: SequenceSet, named: str) -> RatedResponses:
        answers = RatedResponses(sequences, self._spec.max_length)
        if sequences.parts and 0 in (counts := answers.counts).values():
            found = " and ".join(f"{count:,} {name}" for name, count in counts.items())
            raise StageError(
                self._job.stage,
                f"the {sequences.stats.rows:,} rows of `{named}` give {found} answers",
                cause="what is wanted is only learned beside what is not"
                + (f"; {sequences.stats.num_unusable:,} rows are unusable" if sequences.stats.num_unusable else ""),
                remedy="give rows with `label` true and false, or preference pairs (docs/data.md)",
            )
        return answers

    def _collate(self, data: RatedResponses, batch: Sequence[int], others: Sequence[int]) -> dict[str, torch.Tensor]:
        """The answers, and as `other_..` those handed on; wanted: (rows,) bool."""
        pad = self._policy.tokenizer.pad_token_id
        own = padded([data.sequence(index) for index in batch], pad)
        other = padded([data.with_answer_of(*pair) for pair in zip(batch, others, strict=True)], pad)
        wanted = torch.tensor([bool(data.sequences.row_labels[index] == 1) for index in batch])
        return {**own, **{f"other_{name}": values for name, values in other.items()}, "wanted": wanted}


class KtoTrainer(ReferenceLogProbs, KTOTrainer):  # type: ignore[misc]  # trl ships no types
    """With our data order, z of a whole step, and an exact evaluation."""

    def __init__(
        self,
        *,
        spec: Kto,
        eval_lengths: Integers,
        eval_partners: Sequence[int],
        collate_evaluated: Callable[[list[int], list[int]], dict[str, torch.Tensor]],
        **arguments: Any,
    ) -> None:
        self._spec = spec
        self._eval_lengths, self._eval_partners = eval_lengths, eval_partners
        self._collate_evaluated = collate_evaluated
        self._seen: list[torch.Tensor] = []
        """(rows, 2) each: reward and whether it is wanted, since the last log."""
        super().__init__(**arguments)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[dict[str, torch.Tensor]], Any]:
        """The micro batches of a step, each with its z."""
        batches, items = super().get_batch_samples(*args, **kwargs)
        with torch.no_grad(), self.compute_loss_context_manager():
            ratios = [self.log_ratios(self.model_wrapped, _others(batch)) for batch in batches]
        z = baseline(self.accelerator.gather(torch.cat(ratios)))
        self._metrics["train"]["kl"].append(z.item())
        return [{**batch, "z": z} for batch in batches], items

    def compute_loss(
        self, model: Any, inputs: dict[str, torch.Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """The mean over rows: so micro batches and workers add up to the same, however cut."""
        ratios, wanted = self.log_ratios(model, inputs), inputs["wanted"]
        rewards = self._spec.beta * ratios.detach()
        self._seen.append(self.accelerator.gather(torch.stack([rewards, wanted.to(rewards.dtype)], dim=1)))
        return response_losses(self._spec, ratios, wanted, inputs["z"]).mean()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training and self._seen:
            rewards, wanted = torch.cat(self._seen).unbind(dim=1)
            if (difference := margin(rewards, wanted > 0)) is not None:
                logs["margin"] = difference
            self._seen.clear()
        super().log(logs, start_time)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Of the whole set: eval_loss (an answer's, from 0 to its weight), eval_margin (mean implicit reward of the
        wanted answers less that of the unwanted ones)."""

        def measure(batch: list[int]) -> torch.Tensor:
            given = self._collate_evaluated(batch, [self._eval_partners[index] for index in batch])
            inputs = self._prepare_inputs(given)
            return torch.stack(
                [
                    *(self.log_ratios(self.model_wrapped, part) for part in (inputs, _others(inputs))),
                    inputs["wanted"].float(),
                ],
                dim=1,
            )

        size = self.args.per_device_eval_batch_size
        ratios, others, labels = self.measured(self._eval_lengths, 3, measure, size).unbind(dim=1)
        wanted = labels > 0
        difference = margin(self._spec.beta * ratios, wanted)
        assert difference is not None, "both kinds are there"
        losses = response_losses(self._spec, ratios, wanted, baseline(others))
        return self.told({"eval_loss": losses.mean().item(), "eval_margin": difference})


def _others(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("other_"): values for name, values in batch.items() if name.startswith("other_")}


def baseline(ratios: torch.Tensor) -> torch.Tensor:
    """z, a scalar in nats, from the log ratios of mismatched answers."""
    return ratios.mean().clamp(min=0)


def response_losses(spec: Kto, ratios: torch.Tensor, wanted: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """(answers,), equations 7 and 8 of the paper, from log ratios in nats and bool."""
    ahead = torch.where(wanted, ratios - z, z - ratios)
    weights = torch.where(wanted, spec.desirable_weight, spec.undesirable_weight)
    return weights * (1 - torch.sigmoid(spec.beta * ahead))


def margin(rewards: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """Of the mean of wanted ones over that of the others; None where there are not both."""
    if wanted.all() or not wanted.any():
        return None
    return float(rewards[wanted].mean() - rewards[~wanted].mean())
