"""The probability of one label under a text classifier, at a temperature (Guo et al. 2017,
https://arxiv.org/abs/1706.04599, section 4.2)."""

from __future__ import annotations

import numpy as np

from tunery.models.labels import Labels
from tunery.scoring.scorers.interfaces import Columns
from tunery.spec import AUTO, Classifier


class ClassifierScorer:
    def __init__(self, spec: Classifier, labels: Labels, model: str) -> None:
        """Raises BadModel if `model` has no such label, or no fitted temperature although the spec requires it."""
        self._labels = labels
        self._label = labels.index(spec.label, model)
        self._temperature = labels.fitted_temperature(model) if spec.temperature == AUTO else spec.temperature

    def __call__(self, logits_nl: np.ndarray) -> Columns:
        """Return "score" in [0, 1] (NaN for a row without tokens) and "predicted", the most probable label.

        In a multi-label model, "predicted" lists the labels with a probability of at least 1/2, separated by commas.
        """
        scaled_nl = logits_nl.astype(np.float64) / self._temperature
        if self._labels.independent:
            # The sigmoid in the form that does not overflow.
            exp_nl = np.exp(-np.abs(scaled_nl))
            probabilities_nl = np.where(scaled_nl >= 0, 1.0, exp_nl) / (1.0 + exp_nl)
        else:
            weights_nl = np.exp(scaled_nl - scaled_nl.max(axis=1, keepdims=True))
            probabilities_nl = weights_nl / weights_nl.sum(axis=1, keepdims=True)
        return {
            "score": probabilities_nl[:, self._label].tolist(),
            "predicted": [self._predicted_labels(probabilities_l) for probabilities_l in probabilities_nl],
        }

    def _predicted_labels(self, probabilities_l: np.ndarray) -> str:
        names = self._labels.names
        if np.isnan(probabilities_l).any():
            return ""
        if self._labels.independent:
            return ", ".join(name for name, p in zip(names, probabilities_l, strict=True) if p >= 0.5)
        return names[int(probabilities_l.argmax())]
