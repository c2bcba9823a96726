"""Class weights, cross entropy and the fitted temperature against hand-worked values."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tunery.models.metrics import MAX_TEMPERATURE, MIN_TEMPERATURE, class_weights, cross_entropy, fitted_temperature

LOGITS_AND_LABELS = np.array([[0.0, 2.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]]), np.array([1, 1, 0, 1])
"""Two classes whose logits differ by 2. The larger logit is that of the label in three of the four rows."""
EQUAL_WEIGHTS = np.ones(4)


def test_class_weights_give_every_label_equal_total_weight_and_mean_1() -> None:
    labels = np.array([0] * 24 + [1] * 72)
    weights = class_weights(labels, 2)
    assert weights.tolist() == pytest.approx([2.0, 2 / 3])
    assert weights[labels].mean() == pytest.approx(1.0)


def test_cross_entropy_is_the_weighted_mean_of_negative_log_probabilities() -> None:
    correct_loss, wrong_loss = math.log1p(math.exp(-2)), math.log1p(math.exp(2))
    assert cross_entropy(*LOGITS_AND_LABELS, EQUAL_WEIGHTS) == pytest.approx((3 * correct_loss + wrong_loss) / 4)
    assert cross_entropy(*LOGITS_AND_LABELS, np.array([1.0, 1.0, 1.0, 5.0])) == pytest.approx(
        (3 * correct_loss + 5 * wrong_loss) / 8
    )


def test_cross_entropy_of_large_logits_is_finite() -> None:
    logits = np.array([[1e4, -1e4]])
    assert cross_entropy(logits, np.array([0]), np.ones(1)) == 0
    assert cross_entropy(logits, np.array([1]), np.ones(1)) == 2e4


def test_fitted_temperature_calibrates_the_probability() -> None:
    # sigmoid(2 / T) = 3/4, so T = 2 / ln 3.
    assert fitted_temperature(*LOGITS_AND_LABELS, EQUAL_WEIGHTS) == pytest.approx(2 / math.log(3))


def test_fitted_temperature_uses_row_weights() -> None:
    # The wrong row counts half: sigmoid(2 / T) = 6/7.
    assert fitted_temperature(*LOGITS_AND_LABELS, np.array([1, 1, 1, 0.5])) == pytest.approx(2 / math.log(6))


def test_fitted_temperature_is_a_local_minimum_of_cross_entropy() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(60, 2)) * 3, rng.integers(0, 2, 60)
    labels[:45] = logits[:45].argmax(axis=1)
    best = fitted_temperature(logits, labels, np.ones(60))
    assert MIN_TEMPERATURE < best < MAX_TEMPERATURE
    losses = [cross_entropy(logits, labels, np.ones(60), best * factor) for factor in (0.95, 1.0, 1.05)]
    assert losses[1] == min(losses)


def test_temperature_stays_in_bounds_if_all_or_no_rows_are_correct() -> None:
    logits = np.array([[0.0, 2.0], [2.0, 0.0]])
    assert fitted_temperature(logits, np.array([1, 0]), np.ones(2)) == pytest.approx(MIN_TEMPERATURE, rel=0.1)
    assert fitted_temperature(logits, np.array([0, 1]), np.ones(2)) == pytest.approx(MAX_TEMPERATURE)
