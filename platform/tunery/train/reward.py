"""What `reward` learns: to give the chosen answer of a pair more than the rejected one, by TRL's RewardTrainer.

The loss of a pair is -log sigmoid(chosen - rejected) (Bradley-Terry; Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155, equation 1). Only differences are learned by it: where 0 lies, and how far apart
rewards are, is left to chance. So that scale is measured at the end, and kept with the model. Both sides of a pair are
shown to the model as to the scorer that will use it (models/shown.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainerControl
from trl import RewardConfig, RewardTrainer

from tunery.errors import StageError
from tunery.models.labels import REWARD, Scale
from tunery.models.metrics import Floats, preference_accuracy, preference_loss
from tunery.models.shown import RowReader, Seen
from tunery.models.tokenized_dataset import Integers
from tunery.spec import RewardTraining
from tunery.store.rows import CONTENT, Row
from tunery.train.headed import HeadedModel, HeadProbe, logits_of
from tunery.train.job import Job, Rows, rows_of
from tunery.train.reload_check import MAX_SEQUENCES
from tunery.train.sequences import check_unusable

COLUMNS = [*CONTENT, "id", "rejected"]
SCALE_PAIRS = 2000
"""Training pairs whose answers give the scale, where there is no eval_data: the mean of 4,000 answers is known to a
sixtieth of their deviation."""
REASONS = {
    "unpaired": "are no pairs",
    "empty": "have an empty answer",
    "alike": "look the same on both sides",
    "rejected": "can't be rendered by the chat template",
}
"""Why a row can't be learned from, as facts and as people have it."""
Pair = tuple[Seen, Seen]
"""What is seen of the chosen answer and of the rejected one, each after all that comes before it."""


@dataclass
class Pairs:
    """Preference pairs, in the order of their rows."""

    seen: list[Pair] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)
    rows: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    """Rows that can't be learned from, by reason."""

    @property
    def truncated(self) -> int:
        """Pairs with a side that was cut."""
        return sum(chosen.truncated or rejected.truncated for chosen, rejected in self.seen)

    def reasons(self) -> str:
        return ", ".join(f"{self.unusable[name]:,} {words}" for name, words in REASONS.items() if self.unusable[name])


def pairs_of(rows: Iterator[Row], read: RowReader) -> Pairs:
    """All that can be learned from, and counts of the rest."""
    pairs = Pairs()
    while some := list(islice(rows, 1000)):
        pairs.rows += len(some)
        given = [(row, sides) for row in some if (sides := _sides(row, pairs.unusable)) is not None]
        seen = read([side for _, sides in given for side in sides])
        for (row, _), chosen, rejected in zip(given, seen[::2], seen[1::2], strict=True):
            if chosen.rejected or rejected.rejected:
                pairs.unusable["rejected"] += 1
            elif (chosen.ids, chosen.types) == (rejected.ids, rejected.types):
                pairs.unusable["alike"] += 1
            else:
                pairs.seen.append((chosen, rejected))
                pairs.ids.add(row["id"])
    return pairs


def _sides(row: Row, unusable: Counter[str]) -> tuple[Row, Row] | None:
    """The conversation with the chosen answer, and with the rejected one."""
    chosen, rejected = row.get("messages"), row.get("rejected")
    if not chosen or not rejected:
        unusable["unpaired"] += 1
        return None
    if _says_nothing(chosen[-1:]) or _says_nothing(rejected):
        unusable["empty"] += 1
        return None
    return row, {**row, "messages": [*chosen[:-1], *rejected]}


def _says_nothing(turns: Sequence[dict[str, Any]]) -> bool:
    return not any((turn["content"] or "").strip() or turn.get("tool_calls") for turn in turns)


def measures(rewards_p2: Floats) -> dict[str, float]:
    """Of rewards (pairs, 2), chosen and rejected: eval_loss in nats a pair, without what `center` adds, so that models
    with another one can be compared; eval_accuracy, the share of pairs whose chosen answer has more; eval_margin, how
    much more on average."""
    margins = rewards_p2[:, 0] - rewards_p2[:, 1]
    return {
        "eval_loss": preference_loss(margins),
        "eval_accuracy": preference_accuracy(margins),
        "eval_margin": float(margins.mean()),
    }


def scale_of(rewards: Floats, stage: str) -> Scale:
    """Mean and standard deviation over all of them. Raises StageError where nothing can be divided by it."""
    mean, deviation = float(rewards.mean()), float(rewards.std())
    if not 0 < deviation < np.inf:
        raise StageError(
            stage,
            f"the reward model has no scale: its outputs for {rewards.size:,} answers have mean {mean:g} and standard "
            f"deviation {deviation:g}",
            cause="the training diverged, or it gives every answer the same",
            remedy="lower learning_rate, or give more varied pairs",
        )
    return Scale(mean, deviation)


class RewardModelling:
    """A head of one output on a language model, trained with it or beside an adapter."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError when no pair is left to learn from, or none of eval_data to be measured on."""
        assert isinstance(job.spec, RewardTraining)
        self._job, self._center = job, job.spec.center
        self._headed = HeadedModel(job, job.spec.tuner, REWARD, rank)
        self._data = self._pairs(job.rows, "data")
        self._measured = self._pairs(job.eval_rows, "eval_data") if job.eval_rows else Pairs()
        self.lengths = [len(chosen.ids) + len(rejected.ids) for chosen, rejected in self._data.seen]
        self.part_sizes = [len(self.lengths)]

    def trainer(self, arguments: dict[str, Any], order: Integers, steps: TrainerCallback) -> PairTrainer:
        settings = RewardConfig(
            **arguments,
            max_length=None,  # the rows are cut already
            # TRL (1.16) would switch a model's dropout off, and LoRA's with it: the spec's would do nothing.
            disable_dropout=False,
            center_rewards_coefficient=self._center or None,
            remove_unused_columns=False,
        )
        return PairTrainer(
            model=self._headed.load(),
            args=settings,
            train_dataset=_dataset(self._data.seen).select(order),
            processing_class=self._headed.tokenizer,
            data_collator=self._collate,
            callbacks=[steps],
            held_out=self._measured.seen,
            read=self._headed.read,
        )

    def save(self, trainer: PairTrainer) -> None:
        self._headed.save(trainer)

    def probe(self, parameters: int) -> HeadProbe:
        return self._headed.probe([side for pair in self._data.seen[:MAX_SEQUENCES] for side in pair], parameters)

    def counted(self) -> dict[str, Any]:
        data, measured = self._data, self._measured
        return {
            "rows": data.rows,
            "pairs": len(data.seen),
            "truncated": data.truncated,
            "unusable": data.unusable.total(),
            "unusable_because": {reason: data.unusable[reason] for reason in REASONS},
            "eval_rows": measured.rows,
            "eval_pairs": len(measured.seen),
            "eval_unusable": measured.unusable.total(),
            "eval_rows_trained_on": len(measured.ids & data.ids),
        }

    def found(self, trainer: PairTrainer) -> dict[str, Any]:
        """eval_accuracy, eval_margin: at the end; reward_mean, reward_deviation: of the outputs for all answers of
        eval_data, or else for those of 2,000 training pairs that lie evenly among the rows."""
        rewards_p2 = trainer.measured
        told = {} if rewards_p2 is None else measures(rewards_p2)
        if rewards_p2 is None:
            rewards_p2 = trainer.rewards_of(evenly(self._data.seen, SCALE_PAIRS))
        scale = scale_of(rewards_p2, self._job.stage)
        return {
            **told,
            "reward_mean": scale.mean,
            "reward_deviation": scale.deviation,
            "scale_answers": rewards_p2.size,
            "scale_from": "eval_data" if told else "data",
        }

    def _pairs(self, sources: Sequence[Rows], named: str) -> Pairs:
        pairs = pairs_of(rows_of(sources, COLUMNS), self._headed.read)
        if not pairs.seen:
            limit = self._job.spec.max_length
            raise StageError(
                self._job.stage,
                f"none of the {pairs.rows:,} rows of `{named}` is a pair that can be used: {pairs.reasons()}",
                cause="a pair is a question with two answers that differ within max_length "
                f"({limit}) tokens, the question's among them",
                remedy="give rows with `chosen` and `rejected` (docs/data.md), or raise max_length",
            )
        reasons = Counter({REASONS[name]: number for name, number in pairs.unusable.items()})
        check_unusable(self._job, named, pairs.rows, reasons)
        return pairs

    def _collate(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """What the model takes: all chosen sides, then all rejected ones, as TRL's loss has them."""
        sides = [
            Seen(example[f"{side}_ids"], example[f"{side}_types"], False)
            for side in ("chosen", "rejected")
            for example in examples
        ]
        return self._headed.read.tensors(sides, device="cpu")


def evenly(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most so many of them, at even distances."""
    count = min(most, len(pairs))
    return [pairs[index * len(pairs) // count] for index in range(count)]


def _dataset(pairs: Sequence[Pair]) -> Dataset:
    """With the columns by which TRL knows that rows are tokens already, and what else of a side is seen."""
    columns: dict[str, list[list[int]]] = {}
    for place, side in enumerate(("chosen", "rejected")):
        columns[f"{side}_ids"] = [pair[place].ids for pair in pairs]
        columns[f"{side}_types"] = [pair[place].types for pair in pairs]
    return Dataset.from_dict(columns)


class PairTrainer(RewardTrainer):  # type: ignore[misc]  # trl ships no types
    """With our data order, a loss in fp32, and an exact evaluation."""

    def __init__(self, *, held_out: Sequence[Pair], read: RowReader, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._held_out, self._read = held_out, read
        self.measured: Floats | None = None
        """Of the last evaluation: rewards (pairs, 2)."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """TRL's, the mean over pairs: so micro batches and workers add up to the same, however cut. Of rewards in fp32:
        in bf16 numbers between 2 and 4 lie 1/64 apart, and so would their differences."""

        def rewards(use_cache: bool, **given: Any) -> Any:
            # `use_cache`, which TRL passes, is not known to every encoder; the config says it.
            outputs = model(**given)
            outputs.logits = outputs.logits.float()
            return outputs

        return super().compute_loss(rewards, inputs, *args, **kwargs)

    def rewards_of(self, pairs: Sequence[Pair]) -> Floats:
        """(pairs, 2), chosen and rejected. All ranks take part."""
        return logits_of(self, self._read, [side for pair in pairs for side in pair]).reshape(len(pairs), 2)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`measures` of all held-out pairs: the rewards of all ranks are put together."""
        self.measured = self.rewards_of(self._held_out)
        metrics = measures(self.measured)
        self.log(dict(metrics))  # TRL adds to what it is given
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The manifest tells more, and a card would be written anew into every checkpoint."""
