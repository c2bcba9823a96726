"""What `reward` learns: to give the chosen answer of a pair more than the rejected one, by TRL's RewardTrainer.

The loss of a pair is -log sigmoid(chosen - rejected) (Bradley-Terry; Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155, equation 1). Only differences are learned by it: where 0 lies, and how far apart
rewards are, is left to chance. So that scale is measured at the end, and kept with the model. Both sides of a pair are
shown to the model as to the scorer that will use it (models/classifier_inputs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import SequentialSampler
from transformers import TrainerCallback, TrainerControl
from trl import RewardConfig, RewardTrainer

from tunery.errors import StageError
from tunery.models.classifier_inputs import ClassifierEncoder
from tunery.models.labels import REWARD, RewardNorm
from tunery.models.metrics import Floats, preference_accuracy, preference_loss
from tunery.models.tokenized_dataset import Integers
from tunery.spec import RewardTraining
from tunery.training.classification_head import HeadProbe, ModelWithHead, logits_of, rows_in_both
from tunery.training.dpo import PairSet
from tunery.training.job import Job
from tunery.training.reference_log_probs import indices
from tunery.training.reload_check import MAX_SEQUENCES

SCALE_PAIRS = 2000
"""Training pairs whose responses give the scale, where there is no eval_data: the mean of 4,000 responses is known to a
sixtieth of their deviation."""


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


def scale_of(rewards: Floats, stage: str) -> RewardNorm:
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
    return RewardNorm(mean, deviation)


class RewardTask:
    """A head of one output on a language model, trained with it or beside an adapter."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError when no pair is left to learn from, or none of eval_data to be measured on."""
        assert isinstance(job.spec, RewardTraining)
        self._job, self._center = job, job.spec.center
        self._headed = ModelWithHead(job, job.spec.tuner, REWARD, rank)
        data, evaluated = self._headed.sequences()
        self._data, self._evaluated = PairSet(data), PairSet(evaluated)
        self.examples = self._data

    def trainer(self, arguments: dict[str, Any], order: Integers, steps: TrainerCallback) -> PairRewardTrainer:
        settings = RewardConfig(
            **arguments,
            max_length=None,  # the rows come as tokens, cut already
            # TRL (1.16) would switch a model's dropout off, and LoRA's with it: the spec's would do nothing.
            disable_dropout=False,
            center_rewards_coefficient=self._center or None,
            remove_unused_columns=False,
        )
        return PairRewardTrainer(
            model=self._headed.load(),
            args=settings,
            train_dataset=indices(order),
            processing_class=self._headed.tokenizer,
            data_collator=lambda rows: self._collate([row["index"] for row in rows]),
            callbacks=[steps],
            evaluated=self._evaluated,
            read=self._headed.read,
        )

    def save(self, trainer: PairRewardTrainer) -> None:
        self._headed.save(trainer)

    def probe(self, parameters: int) -> HeadProbe:
        first = range(min(MAX_SEQUENCES, len(self._data.sequences)))
        return self._headed.probe([self._data.sequences.encoded(index) for index in first], parameters)

    def counted(self) -> dict[str, Any]:
        data, evaluated = self._data.sequences, self._evaluated.sequences
        return {
            "rows": data.stats.rows,
            "pairs": len(self._data),
            "truncated": data.stats.truncated,
            "unusable": data.stats.num_unusable,
            "unusable_because": dict(data.stats.unusable.most_common()),
            "eval_rows": evaluated.stats.rows,
            "eval_pairs": len(self._evaluated),
            "eval_unusable": evaluated.stats.num_unusable,
            "eval_rows_trained_on": rows_in_both(data, evaluated),
        }

    def found(self, trainer: PairRewardTrainer) -> dict[str, Any]:
        """eval_accuracy, eval_margin: at the end; reward_mean, reward_deviation: of the outputs for all answers of
        eval_data, or else for those of 2,000 training pairs that lie evenly among the rows."""
        rewards_p2 = trainer.measured
        told = {} if rewards_p2 is None else measures(rewards_p2)
        if rewards_p2 is None:
            rewards_p2 = trainer.rewards_of(self._data, evenly(len(self._data), SCALE_PAIRS))
        scale = scale_of(rewards_p2, self._job.stage)
        return {
            **told,
            "reward_mean": scale.mean,
            "reward_deviation": scale.deviation,
            "scale_answers": rewards_p2.size,
            "scale_from": "eval_data" if told else "data",
        }

    def _collate(self, pairs: Sequence[int]) -> dict[str, torch.Tensor]:
        """What the model takes: all chosen sides, then all rejected ones, as TRL's loss has them."""
        sides = [self._data.sequences.encoded(index) for index in self._data.sides(pairs)]
        return self._headed.read.tensors(sides, device="cpu")


def evenly(count: int, most: int) -> list[int]:
    """At most `most` of `count` places, at even distances."""
    taken = min(most, count)
    return [place * count // taken for place in range(taken)]


class PairRewardTrainer(RewardTrainer):  # type: ignore[misc]  # trl ships no types
    """With our data order, a loss in fp32, and an exact evaluation."""

    def __init__(self, *, evaluated: PairSet, read: ClassifierEncoder, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._evaluated, self._read = evaluated, read
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

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Rows are indices: their tokens are read when a batch is collated."""
        return dataset

    def rewards_of(self, pairs: PairSet, chosen: Sequence[int]) -> Floats:
        """(pairs, 2) of those with the numbers `chosen`: the chosen and the rejected side. All ranks take part."""
        sides = np.array([(2 * pair, 2 * pair + 1) for pair in chosen], np.int64).flatten()
        data = pairs.sequences
        rewards_n1 = logits_of(self, self._read, data.lengths[sides], lambda place: data.encoded(int(sides[place])))
        return rewards_n1.reshape(len(chosen), 2)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """`measures` of all held-out pairs: the rewards of all ranks are put together."""
        self.measured = self.rewards_of(self._evaluated, range(len(self._evaluated)))
        metrics = measures(self.measured)
        self.log(dict(metrics))  # TRL adds to what it is given
        self.control: TrainerControl = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """The manifest tells more, and a card would be written anew into every checkpoint."""
