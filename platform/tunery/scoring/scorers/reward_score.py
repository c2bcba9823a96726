"""The score of a reward model: its one logit (Stiennon et al. 2020, https://arxiv.org/abs/2009.01325).

As it is, of a model from outside; of a `reward` stage less its mean and divided by its deviation over held-out answers.
"""

from __future__ import annotations

import numpy as np

from tunery.models.labels import Labels
from tunery.scoring.scorers.registry import Columns
from tunery.spec import Reward


class RewardScorer:
    def __init__(self, spec: Reward, labels: Labels, model: str) -> None:
        """Raises BadModel where `model` has several labels."""
        labels.check_single(model)
        self._scale = labels.scale

    def __call__(self, logits_nl: np.ndarray) -> Columns:
        """score: without bounds, NaN for a row without a token."""
        outputs = logits_nl[:, 0].astype(np.float64)
        return {"score": (outputs if self._scale is None else self._scale(outputs)).tolist()}
