"""Metrics of scores, classifiers and reward models, and temperature fitting. Pure functions."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Search interval: if all rows are classified correctly, the best temperature would be 0."""


def auc(badness: Floats, bad: Bools) -> float | None:
    """Area under the ROC curve: the probability that a bad row scores worse than a good one; ties count half.

    Computed from the rank sum of Mann and Whitney (1947). None if there are only good or only bad rows.
    """
    n_bad, n_good = int(bad.sum()), int((~bad).sum())
    if n_bad == 0 or n_good == 0:
        return None
    _, inverse, counts = np.unique(badness, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[bad].sum() - n_bad * (n_bad + 1) / 2) / (n_bad * n_good))


def class_weights(labels: Integers, classes: int) -> Floats:
    """Weights, (classes,), that give all classes the same total weight and rows a mean weight of 1 (n / (classes x n of
    the class), King & Zeng 2001, https://doi.org/10.1093/oxfordjournals.pan.a004868). Every class must have a row."""
    counts = np.bincount(labels, minlength=classes)
    weights: Floats = len(labels) / (classes * counts)
    return weights


def cross_entropy(logits_nl: Floats, labels: Integers, weights: Floats, temperature: float = 1.0) -> float:
    """Nats a row: the mean of -log p(label), rows weighted."""
    scaled_nl = logits_nl / temperature
    top = scaled_nl.max(axis=1)
    logs = np.log(np.exp(scaled_nl - top[:, None]).sum(axis=1)) + top
    losses = logs - scaled_nl[np.arange(len(labels)), labels]
    return float((losses * weights).sum() / weights.sum())


def fitted_temperature(logits_nl: Floats, labels: Integers, weights: Floats) -> float:
    """Return the temperature that minimizes the cross entropy (Guo et al. 2017, https://arxiv.org/abs/1706.04599,
    section 4.2).

    The cross entropy is convex in 1 / temperature, so bisection finds the root of its slope, between 0.05 and 20.
    """

    def slope(inverse: float) -> float:
        """Slope of the cross entropy in 1 / temperature: expected minus true logit."""
        scaled_nl = logits_nl * inverse
        probs_nl = np.exp(scaled_nl - scaled_nl.max(axis=1, keepdims=True))
        probs_nl /= probs_nl.sum(axis=1, keepdims=True)
        true = logits_nl[np.arange(len(labels)), labels]
        return float((((probs_nl * logits_nl).sum(axis=1) - true) * weights).sum())

    low, high = math.log(1 / MAX_TEMPERATURE), math.log(1 / MIN_TEMPERATURE)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def preference_loss(margins: Floats) -> float:
    """Mean of -log sigmoid(margin) over pairs, in nats (Bradley-Terry)."""
    return float(np.logaddexp(0, -margins).mean())


def preference_accuracy(margins: Floats) -> float:
    """Fraction of pairs whose chosen response has the higher reward; ties count half."""
    return float((margins > 0).mean() + (margins == 0).mean() / 2)
