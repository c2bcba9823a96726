"""Metrics of scores, classifiers and reward models, and temperature fitting. Pure functions."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]

MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
"""Interval that `fitted_temperature` searches: if all rows are classified correctly, the best temperature would be
0."""


def auc(scores: Floats, positive: Bools) -> float | None:
    """Return the area under the ROC curve: the probability that a positive row has a higher score than a negative one,
    where ties count half. None if all rows are positive or all are negative.

    scores, positive: (rows,). Computed from the rank sum of Mann and Whitney (1947).
    """
    num_positive, num_negative = int(positive.sum()), int((~positive).sum())
    if num_positive == 0 or num_negative == 0:
        return None
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    rank_sum = ranks[positive].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def class_weights(labels: Integers, num_classes: int) -> Floats:
    """Return the weight of each class, (classes,): rows / (classes x rows of the class). All classes then have the same
    total weight, and the mean weight of rows is 1. Every class must have a row.

    King & Zeng 2001, https://doi.org/10.1093/oxfordjournals.pan.a004868.
    """
    counts = np.bincount(labels, minlength=num_classes)
    weights: Floats = len(labels) / (num_classes * counts)
    return weights


def cross_entropy(logits_nl: Floats, labels: Integers, weights: Floats, temperature: float = 1.0) -> float:
    """Return the weighted mean of -log p(label) over rows, in nats. logits_nl: (rows, labels); labels, weights:
    (rows,)."""
    scaled_nl = logits_nl / temperature
    max_n = scaled_nl.max(axis=1)
    log_sum_exp_n = np.log(np.exp(scaled_nl - max_n[:, None]).sum(axis=1)) + max_n
    losses_n = log_sum_exp_n - scaled_nl[np.arange(len(labels)), labels]
    return float((losses_n * weights).sum() / weights.sum())


def fitted_temperature(logits_nl: Floats, labels: Integers, weights: Floats) -> float:
    """Return the temperature that minimizes the `cross_entropy` (Guo et al. 2017, https://arxiv.org/abs/1706.04599,
    section 4.2).

    The cross entropy is convex in 1 / temperature, so bisection finds the root of its derivative. The temperature is
    between 0.05 and 20.
    """

    def derivative(inverse_temperature: float) -> float:
        """Return the derivative of the summed cross entropy by 1 / temperature: expected logit minus logit of the
        label."""
        scaled_nl = logits_nl * inverse_temperature
        probs_nl = np.exp(scaled_nl - scaled_nl.max(axis=1, keepdims=True))
        probs_nl /= probs_nl.sum(axis=1, keepdims=True)
        label_logits_n = logits_nl[np.arange(len(labels)), labels]
        return float((((probs_nl * logits_nl).sum(axis=1) - label_logits_n) * weights).sum())

    low, high = math.log(1 / MAX_TEMPERATURE), math.log(1 / MIN_TEMPERATURE)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if derivative(math.exp(middle)) < 0 else (low, middle)
    return math.exp(-(low + high) / 2)


def preference_loss(margins: Floats) -> float:
    """Return the mean of -log sigmoid(margin) over pairs, in nats (Bradley-Terry)."""
    return float(np.logaddexp(0, -margins).mean())


def preference_accuracy(margins: Floats) -> float:
    """Return the fraction of pairs whose chosen response has the higher reward, where ties count half. margins: reward
    of the chosen response minus that of the rejected one, (pairs,)."""
    return float((margins > 0).mean() + (margins == 0).mean() / 2)
