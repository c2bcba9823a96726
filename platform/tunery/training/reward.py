"""`reward`: train a reward model on preference pairs, by TRL's RewardTrainer.

The loss of a pair is -log sigmoid(chosen reward - rejected reward) (Bradley-Terry; Ouyang et al. 2022,
https://arxiv.org/abs/2203.02155, equation 1). It determines only differences of rewards. The mean and standard
deviation of the outputs are therefore computed after the training and stored with the model, to normalize its rewards.
Rows are encoded by the same function as when the model scores rows (models/classifier_inputs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback
from trl import RewardConfig, RewardTrainer

from tunery.errors import StageError
from tunery.models.classifier_inputs import ClassifierEncoder
from tunery.models.labels import RewardNorm
from tunery.models.metrics import Floats, preference_accuracy, preference_loss
from tunery.models.tokenized_dataset import Integers
from tunery.spec import REWARD, RewardTraining
from tunery.training.classification_head import HeadProbe, ModelWithHead, compute_logits, num_shared_rows
from tunery.training.distributed_eval import FixedOrderMixin, index_dataset
from tunery.training.job import Job
from tunery.training.pairs import PairSet
from tunery.training.reload_check import MAX_SEQUENCES

MAX_NORM_PAIRS = 2000
"""Maximum number of training pairs that the normalization is computed from without `eval_data`: the standard error of
the mean of 4,000 responses is 1/63 of their standard deviation."""


def preference_metrics(rewards_p2: Floats) -> dict[str, float]:
    """Return metrics of the rewards of chosen and rejected responses, (pairs, 2).

    eval_loss: mean loss per pair in nats, without the `center` term, so that models with different `center` are
    comparable; eval_accuracy: fraction of pairs whose chosen response has the higher reward, where ties count half;
    eval_margin: mean difference of the two rewards.
    """
    margins = rewards_p2[:, 0] - rewards_p2[:, 1]
    return {
        "eval_loss": preference_loss(margins),
        "eval_accuracy": preference_accuracy(margins),
        "eval_margin": float(margins.mean()),
    }


def reward_norm(rewards: Floats, stage: str) -> RewardNorm:
    """Return mean and standard deviation of the rewards. Raises StageError if the latter is zero or not finite."""
    mean, std = float(rewards.mean()), float(rewards.std())
    if not 0 < std < np.inf:
        raise StageError(
            stage,
            f"the outputs of the reward model can't be normalized: for {rewards.size:,} responses their mean is "
            f"{mean:g} and their standard deviation {std:g}",
            cause="the training diverged, or the model gives every response the same reward",
            remedy="lower learning_rate, or give more varied pairs",
        )
    return RewardNorm(mean, std)


class RewardTask:
    """The training task of `reward`: a language model with a scalar head."""

    def __init__(self, job: Job, rank: int) -> None:
        """Raises StageError if no pair of `data`, or of `eval_data`, is usable."""
        assert isinstance(job.spec, RewardTraining)
        self._job, self._center = job, job.spec.center
        self._model = ModelWithHead(job, job.spec.tuner, REWARD, rank)
        data, eval_data = self._model.sequences()
        self._data, self._eval_data = PairSet(data), PairSet(eval_data)
        self.examples = self._data

    def build_trainer(self, arguments: dict[str, Any], order: Integers, callback: TrainerCallback) -> PairRewardTrainer:
        config = RewardConfig(
            **arguments,
            max_length=None,  # rows are tokenized and truncated already
            disable_dropout=False,  # True would disable LoRA dropout too (TRL 1.16)
            center_rewards_coefficient=self._center or None,
            remove_unused_columns=False,
        )
        return PairRewardTrainer(
            model=self._model.load(),
            args=config,
            train_dataset=index_dataset(order),
            processing_class=self._model.tokenizer,
            data_collator=lambda rows: self._collate([row["index"] for row in rows]),
            callbacks=[callback],
            eval_data=self._eval_data,
            encoder=self._model.encoder,
        )

    def save(self, trainer: PairRewardTrainer) -> None:
        self._model.save(trainer)

    def probe(self, num_parameters: int) -> HeadProbe:
        first = range(min(MAX_SEQUENCES, len(self._data.sequences)))
        return self._model.probe([self._data.sequences.encoded(index) for index in first], num_parameters)

    def data_stats(self) -> dict[str, Any]:
        data, eval_data = self._data.sequences, self._eval_data.sequences
        return {
            "rows": data.stats.rows,
            "pairs": len(self._data),
            "truncated": data.stats.truncated,
            "unusable": data.stats.num_unusable,
            "unusable_because": dict(data.stats.unusable.most_common()),
            "eval_rows": eval_data.stats.rows,
            "eval_pairs": len(self._eval_data),
            "eval_unusable": eval_data.stats.num_unusable,
            "eval_rows_trained_on": num_shared_rows(data, eval_data),
        }

    def final_metrics(self, trainer: PairRewardTrainer) -> dict[str, Any]:
        """Return eval_accuracy and eval_margin of the last evaluation, and reward_mean and reward_std over all
        responses of `eval_data`, or without it over those of up to 2,000 evenly spaced training pairs. Call on all
        ranks."""
        rewards_p2 = trainer.eval_rewards
        metrics = {} if rewards_p2 is None else preference_metrics(rewards_p2)
        if rewards_p2 is None:
            rewards_p2 = trainer.compute_rewards(self._data, evenly_spaced(len(self._data), MAX_NORM_PAIRS))
        norm = reward_norm(rewards_p2, self._job.stage)
        return {
            **metrics,
            "reward_mean": norm.mean,
            "reward_std": norm.std,
            "reward_norm_responses": rewards_p2.size,
            "scale_from": "eval_data" if metrics else "data",
        }

    def _collate(self, pairs: Sequence[int]) -> dict[str, torch.Tensor]:
        """Return the model inputs of a batch: all chosen sequences, then all rejected ones, as TRL's loss expects."""
        sequences = [self._data.sequences.encoded(index) for index in self._data.sequence_indices(pairs)]
        return self._model.encoder.tensors(sequences, device="cpu")


def evenly_spaced(count: int, max_samples: int) -> list[int]:
    """Return at most `max_samples` evenly spaced indices below `count`."""
    num_samples = min(max_samples, count)
    return [index * count // num_samples for index in range(num_samples)]


class PairRewardTrainer(FixedOrderMixin, RewardTrainer):  # type: ignore[misc]  # trl ships no types
    """TRL's RewardTrainer with a fixed data order, a loss in fp32 and an exact evaluation."""

    def __init__(self, *, eval_data: PairSet, encoder: ClassifierEncoder, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._eval_data, self._encoder = eval_data, encoder
        self.eval_rewards: Floats | None = None
        """Rewards of the last evaluation, (pairs, 2): chosen, rejected."""

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss, the mean over pairs, from rewards in fp32: bf16 values between 2 and 4 have a spacing of
        1/64, which is too coarse for their differences."""

        def fp32_model(use_cache: bool, **inputs: Any) -> Any:
            # TRL passes `use_cache`, which not every encoder accepts. The config disables the cache already.
            outputs = model(**inputs)
            outputs.logits = outputs.logits.float()
            return outputs

        return super().compute_loss(fp32_model, inputs, *args, **kwargs)

    def compute_rewards(self, pairs: PairSet, selected: Sequence[int]) -> Floats:
        """Return the rewards of the selected pairs, (pairs, 2): chosen, rejected. Call on all ranks."""
        indices = np.array([(2 * pair, 2 * pair + 1) for pair in selected], np.int64).flatten()
        data = pairs.sequences
        rewards_n1 = compute_logits(
            self, self._encoder, data.lengths[indices], lambda index: data.encoded(int(indices[index]))
        )
        return rewards_n1.reshape(len(selected), 2)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Return the `preference_metrics` of the complete evaluation set."""
        self.eval_rewards = self.compute_rewards(self._eval_data, range(len(self._eval_data)))
        return self.report_metrics(preference_metrics(self.eval_rewards))
