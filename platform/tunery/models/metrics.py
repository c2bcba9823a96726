"""How well scores and class probabilities tell rows apart, and rewards the sides of a pair; the temperature at which
probabilities fit. Pure."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

COLDEST, HOTTEST = 0.05, 20.0
"""Temperatures looked at: where all rows are classified right, the colder the better, without end."""


def auc(badness: Floats, bad: Bools) -> float | None:
    """Area under the ROC curve: the chance that a bad row scores worse than a good one, ties counting half.

    By the rank sum of Mann and Whitney (1947). None when there are only good or only bad rows.
    """
    n_bad, n_good = int(bad.sum()), int((~bad).sum())
    if n_bad == 0 or n_good == 0:
        return None
    _, inverse, counts = np.unique(badness, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[bad].sum() - n_bad * (n_bad + 1) / 2) / (n_bad * n_good))


def class_weights(labels: Integers, classes: int) -> Floats:
    """(classes,): by which every class has the same share of a loss, and a row 1 on average (n / (classes x n of the
    class), King & Zeng 2001, https://doi.org/10.1093/oxfordjournals.pan.a004868). Every class must have a row."""
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
    """The temperature of the least cross entropy (Guo et al. 2017, https://arxiv.org/abs/1706.04599, section 4.2).

    The cross entropy is convex in 1 / temperature, so that its slope is followed to 0 by halving an interval; between
    0.05 and 20.
    """

    def slope(inverse: float) -> float:
        """Of the cross entropy in 1 / temperature: expected less true logit."""
        scaled_nl = logits_nl * inverse
        shares_nl = np.exp(scaled_nl - scaled_nl.max(axis=1, keepdims=True))
        shares_nl /= shares_nl.sum(axis=1, keepdims=True)
        true = logits_nl[np.arange(len(labels)), labels]
        return float((((shares_nl * logits_nl).sum(axis=1) - true) * weights).sum())

    low, high = math.log(1 / HOTTEST), math.log(1 / COLDEST)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def preference_loss(margins: Floats) -> float:
    """Nats a pair: the mean of -log sigmoid(margin) of a chosen answer over a rejected one (Bradley-Terry)."""
    return float(np.logaddexp(0, -margins).mean())


def preference_accuracy(margins: Floats) -> float:
    """The share of pairs whose chosen answer has more, ties counting half."""
    return float((margins > 0).mean() + (margins == 0).mean() / 2)
