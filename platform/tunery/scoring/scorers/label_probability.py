"""The probability of one label under a text classifier, at a temperature (Guo et al. 2017,
https://arxiv.org/abs/1706.04599, section 4.2)."""

from __future__ import annotations

import numpy as np

from tunery.models.labels import Labels
from tunery.scoring.scorers.registry import Columns
from tunery.spec import AUTO, Classifier


class ClassifierScorer:
    def __init__(self, spec: Classifier, labels: Labels, model: str) -> None:
        """Raises BadModel where `model` has no such label, or no temperature of its own where that is asked for."""
        self._labels = labels
        self._temperature = labels.fitted_temperature(model) if spec.temperature == AUTO else spec.temperature
        self._label = labels.index(spec.label, model)

    def __call__(self, logits_nl: np.ndarray) -> Columns:
        """score: in [0, 1], NaN for a row without a token; found: the most probable label, or, where a row may have
        several, those of probability 1/2 and more, with commas between; "" where there is none."""
        scaled_nl = logits_nl.astype(np.float64) / self._temperature
        if self._labels.independent:
            # Of the two equal forms the one that does not overflow.
            small_nl = np.exp(-np.abs(scaled_nl))
            probabilities_nl = np.where(scaled_nl >= 0, 1.0, small_nl) / (1.0 + small_nl)
        else:
            weights_nl = np.exp(scaled_nl - scaled_nl.max(axis=1, keepdims=True))
            probabilities_nl = weights_nl / weights_nl.sum(axis=1, keepdims=True)
        return {
            "score": probabilities_nl[:, self._label].tolist(),
            "found": [self._found(probabilities_l) for probabilities_l in probabilities_nl],
        }

    def _found(self, probabilities_l: np.ndarray) -> str:
        names = self._labels.names
        if np.isnan(probabilities_l).any():
            return ""
        if self._labels.independent:
            return ", ".join(name for name, p in zip(names, probabilities_l, strict=True) if p >= 0.5)
        return names[int(probabilities_l.argmax())]
