"""Score of a reward model: its single logit (Stiennon et al. 2020, https://arxiv.org/abs/2009.01325).

The logit of a model trained by a `reward` stage is normalized by its mean and standard deviation over held-out
responses; that of any other model is not.
"""

from __future__ import annotations

import numpy as np

from tunery.models.labels import Labels
from tunery.scoring.scorers.interfaces import Columns
from tunery.spec import Reward


class RewardScorer:
    def __init__(self, spec: Reward, labels: Labels, model: str) -> None:
        """Raises BadModel if `model` has several labels."""
        labels.check_single(model)
        self._scale = labels.reward_norm

    def __call__(self, logits_nl: np.ndarray) -> Columns:
        """Return "score", unbounded; NaN for a row without tokens."""
        outputs = logits_nl[:, 0].astype(np.float64)
        return {"score": (outputs if self._scale is None else self._scale(outputs)).tolist()}
