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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase, TrainerCallback
from trl import KTOConfig, KTOTrainer

from tunery.errors import StageError
from tunery.models.encode import encode
from tunery.spec import Kto
from tunery.store.rows import CONTENT, Row
from tunery.train.job import Job, rows_of
from tunery.train.policy import Policy
from tunery.train.reference import SETTINGS, AgainstReference, Tokens, in_batches, padded, rejected_side, tokens_of
from tunery.train.reload_check import LanguageProbe

COLUMNS = [*CONTENT, "rejected", "label"]
SHIFTS = 64
"""So many ways to hand answers on are looked at."""


@dataclass
class Answers:
    """Rated answers as tokens."""

    tokens: list[Tokens] = field(default_factory=list)
    wanted: list[bool] = field(default_factory=list)
    rows: int = 0
    truncated: int = 0
    unusable: int = 0
    """Rows without a rating, and answers of which nothing is left."""

    @property
    def lengths(self) -> list[int]:
        return [len(ids) for ids, _ in self.tokens]

    @property
    def counts(self) -> dict[str, int]:
        return {"wanted": sum(self.wanted), "unwanted": len(self.wanted) - sum(self.wanted)}

    def dataset(self, order: Sequence[int], group: int, max_length: int) -> Dataset:
        """In `order`, of which each `group` is handed one another's answers."""
        partners = [
            order[start + other]
            for start in range(0, len(order), group)
            for other in mismatched([self._prompt(index) for index in order[start : start + group]])
        ]
        others = [self._with_answer_of(*pair, max_length) for pair in zip(order, partners, strict=True)]
        return Dataset.from_dict(
            {
                "ids": [self.tokens[index][0] for index in order],
                "answer": [self.tokens[index][1] for index in order],
                "wanted": [self.wanted[index] for index in order],
                "other_ids": [ids for ids, _ in others],
                "other_answer": [answer for _, answer in others],
            }
        )

    def _prompt(self, index: int) -> tuple[int, ...]:
        ids, answer = self.tokens[index]
        return tuple(ids[:answer])

    def _with_answer_of(self, index: int, other: int, max_length: int) -> Tokens:
        ids, answer = self.tokens[other]
        prompt = list(self._prompt(index))
        return (prompt + ids[answer:])[:max_length], len(prompt)


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


def answers_of(rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, max_length: int) -> Answers:
    """A rated row gives one answer, a preference pair a wanted and an unwanted one."""
    answers = Answers()
    for some in in_batches(rows):
        answers.rows += len(some)
        rated: list[tuple[Row, bool]] = []
        for row in some:
            if row["messages"] and row["rejected"]:
                rated += [(row, True), (rejected_side(row), False)]
            elif row["messages"] and row["label"] is not None:
                rated.append((row, row["label"]))
            else:
                answers.unusable += 1
        encoded = encode([row for row, _ in rated], tokenizer, max_length)
        for item, (_, wanted) in zip(encoded, rated, strict=True):
            if item.counted:
                answers.tokens.append(tokens_of(item))
                answers.wanted.append(wanted)
                answers.truncated += item.truncated
            else:
                answers.unusable += 1
    return answers


class Rated:
    """The recipe of `kto`."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError when there are not both wanted and unwanted answers in the rows, or in those of
        eval_data."""
        assert isinstance(job.spec, Kto)
        self._job, self._spec = job, job.spec
        self._policy = Policy(job, rank)
        self._data = self._answers(job.rows, "data")
        self._measured = self._answers(job.eval_rows, "eval_data") if job.eval_rows else Answers()
        self.lengths = self._data.lengths

    def trainer(self, arguments: dict[str, Any], order: list[int], steps: TrainerCallback) -> KtoTrainer:
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
        everything = range(len(measured.tokens))
        held_out = measured.dataset(everything, len(everything), spec.max_length) if self._job.eval_rows else None
        return KtoTrainer(
            **self._policy.arguments(),
            spec=spec,
            ref_model=self._policy.second_copy(),
            args=settings,
            train_dataset=self._data.dataset(order, spec.global_batch_size, spec.max_length),
            eval_dataset=held_out,
            data_collator=self._collate,
            callbacks=[steps],
        )

    def save(self, trainer: KtoTrainer) -> None:
        self._policy.save(trainer)

    def probe(self, parameters: int) -> LanguageProbe:
        return LanguageProbe(self._job, [ids for ids, _ in self._data.tokens], parameters)

    def counted(self) -> dict[str, Any]:
        data = self._data
        return {
            "rows": data.rows,
            "sequences": len(data.tokens),
            **data.counts,
            "truncated": data.truncated,
            "unusable": data.unusable,
            "eval_rows": self._measured.rows,
        }

    def found(self, trainer: KtoTrainer) -> dict[str, Any]:
        """eval_margin: at the end."""
        return {"eval_margin": trainer.metrics_at_end.get("eval_margin")}

    def _answers(self, sources: Sequence[Any], named: str) -> Answers:
        answers = answers_of(rows_of(sources, COLUMNS), self._policy.tokenizer, self._spec.max_length)
        if 0 in (counts := answers.counts).values():
            told = " and ".join(f"{count:,} {name}" for name, count in counts.items())
            raise StageError(
                self._job.stage,
                f"the {answers.rows:,} rows of `{named}` give {told} answers",
                cause="what is wanted is only learned beside what is not"
                + (f"; {answers.unusable:,} rows have no rating or nothing left" if answers.unusable else ""),
                remedy="give rows with `label` true and false, or preference pairs (docs/data.md)",
            )
        return answers

    def _collate(self, batch: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The answers, and as `other_..` those handed on; wanted: (rows,) bool."""
        pad = self._policy.tokenizer.pad_token_id
        own = padded([(row["ids"], row["answer"]) for row in batch], pad)
        other = padded([(row["other_ids"], row["other_answer"]) for row in batch], pad)
        wanted = torch.tensor([row["wanted"] for row in batch])
        return {**own, **{f"other_{name}": values for name, values in other.items()}, "wanted": wanted}


class KtoTrainer(AgainstReference, KTOTrainer):  # type: ignore[misc]  # trl ships no types
    """With our data order, z of a whole step, and an exact evaluation."""

    def __init__(self, *, spec: Kto, **arguments: Any) -> None:
        self._spec = spec
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
        return answer_losses(self._spec, ratios, wanted, inputs["z"]).mean()

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
        rows = list(self.eval_dataset)

        def measure(batch: list[int]) -> torch.Tensor:
            inputs = self._prepare_inputs(self.data_collator([rows[index] for index in batch]))
            return torch.stack([self.log_ratios(self.model_wrapped, part) for part in (inputs, _others(inputs))], dim=1)

        lengths = [len(row["ids"]) for row in rows]
        size = self.args.per_device_eval_batch_size
        ratios, others = self.measured(lengths, 2, measure, size).unbind(dim=1)
        wanted = torch.tensor([row["wanted"] for row in rows], device=ratios.device)
        difference = margin(self._spec.beta * ratios, wanted)
        assert difference is not None, "both kinds are there"
        losses = answer_losses(self._spec, ratios, wanted, baseline(others))
        return self.told({"eval_loss": losses.mean().item(), "eval_margin": difference})


def _others(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("other_"): values for name, values in batch.items() if name.startswith("other_")}


def baseline(ratios: torch.Tensor) -> torch.Tensor:
    """z, a scalar in nats, from the log ratios of mismatched answers."""
    return ratios.mean().clamp(min=0)


def answer_losses(spec: Kto, ratios: torch.Tensor, wanted: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """(answers,), equations 7 and 8 of the paper, from log ratios in nats and bool."""
    ahead = torch.where(wanted, ratios - z, z - ratios)
    weights = torch.where(wanted, spec.desirable_weight, spec.undesirable_weight)
    return weights * (1 - torch.sigmoid(spec.beta * ahead))


def margin(rewards: torch.Tensor, wanted: torch.Tensor) -> float | None:
    """Of the mean of wanted ones over that of the others; None where there are not both."""
    if wanted.all() or not wanted.any():
        return None
    return float(rewards[wanted].mean() - rewards[~wanted].mean())
