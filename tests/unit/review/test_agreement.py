"""Agreement, Cohen's kappa and the best threshold against hand-worked values and brute force."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.review.agreement import agreement, best_threshold, between

BOOLS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
SCORES = st.sampled_from([-2.0, 0.0, 1.0, 1.5, 2.0, 1e300, math.inf]) | st.floats(-1e6, 1e6)


def booleans(*values: int) -> np.ndarray:
    return np.array(values, dtype=bool)


def test_kappa_by_hand() -> None:
    # Cohen's textbook case: both keep 20, only A keeps 5, only B 10, neither 15; p_o = 0.7, p_e = 0.5, kappa = 0.4.
    filter_keeps = booleans(*[1] * 20, *[1] * 5, *[0] * 10, *[0] * 15)
    person_keeps = booleans(*[1] * 20, *[0] * 5, *[1] * 10, *[0] * 15)
    assert agreement(filter_keeps, person_keeps) == {
        "reviewed": 50,
        "agreed": 35,
        "share": 0.7,
        "kappa": pytest.approx(0.4),
        "both_keep": 20,
        "both_drop": 15,
        "only_filter_keeps": 5,
        "only_person_keeps": 10,
    }


def test_kappa_of_equal_opposite_and_constant_raters() -> None:
    assert agreement(booleans(1, 0), booleans(1, 0))["kappa"] == 1.0
    assert agreement(booleans(1, 0), booleans(0, 1))["kappa"] == -1.0
    assert agreement(booleans(1, 1), booleans(1, 1))["kappa"] is None
    assert agreement(booleans(1, 0), booleans(1, 1))["kappa"] == 0.0


@given(BOOLS)
def test_agreement_is_symmetric(pairs: list[tuple[bool, bool]]) -> None:
    first, second = (np.array(values, dtype=bool) for values in zip(*pairs, strict=True))
    forward, backward = agreement(first, second), agreement(second, first)
    assert forward["share"] == backward["share"] == np.mean(first == second)
    assert forward["kappa"] == backward["kappa"]
    assert forward["kappa"] is None or -1 <= forward["kappa"] <= 1


@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=40), st.floats(-10, 10))
def test_best_threshold_is_optimal(rows: list[tuple[float, bool]], current: float) -> None:
    badness, person_keeps = np.array([score for score, _ in rows]), np.array([keeps for _, keeps in rows])
    best = best_threshold(badness, person_keeps, current)
    finite = badness[np.isfinite(badness)]
    if not len(finite):
        assert best is None
        return
    assert best is not None
    candidates = [-math.inf, *finite]
    shares = [float(np.mean((np.isfinite(badness) & (badness <= value)) == person_keeps)) for value in candidates]
    assert best.agreement == pytest.approx(max(shares))
    assert np.mean((np.isfinite(badness) & (badness <= best.value)) == person_keeps) == pytest.approx(best.agreement)
    current_agreement = float(np.mean((np.isfinite(badness) & (badness <= current)) == person_keeps))
    assert best.value == current or current_agreement < best.agreement or not np.isfinite(best.value), (
        "the current threshold is kept unless another one is better"
    )


@pytest.mark.parametrize(
    ("badness", "person_keeps", "current", "value", "share", "at_edge"),
    [
        ([1, 2, 3, 4], [1, 1, 0, 0], 2.5, 2.5, 1.0, False),  # the current threshold is optimal: it is kept
        ([1, 2, 3, 4], [1, 1, 1, 0], 2.5, 3.5, 1.0, False),
        ([1, 2, 3, 4], [1, 1, 1, 1], 2.5, 4.0, 1.0, True),  # no value above 4 was observed
        ([10, 20, 30], [1, 0, 0], 25.0, 15.0, 1.0, False),
        ([1, 2, 3, 4, 5], [1, 0, 1, 0, 0], 4.5, 3.5, 0.8, False),  # of two equally good thresholds, the nearer one
        ([1, 2, 3, 4, 5], [1, 0, 1, 0, 0], 0.5, 1.5, 0.8, False),
        ([1, 2, math.inf], [1, 1, 0], 2.0, 2.0, 1.0, True),  # a row without a score is dropped by every threshold
        ([41.16, 43.9], [1, 0], 60.0, 42.5, 1.0, False),  # rounded to the fewest digits that separate the rows
        ([1, 2], [1, 1], math.inf, math.inf, 1.0, True),  # the filter drops nothing
    ],
)
def test_best_threshold_by_hand(
    badness: list[float], person_keeps: list[int], current: float, value: float, share: float, at_edge: bool
) -> None:
    actual = best_threshold(np.array(badness, dtype=float), booleans(*person_keeps), current)
    assert actual is not None
    assert (actual.value, actual.agreement, actual.at_edge) == (value, pytest.approx(share), at_edge)


def test_best_threshold_that_keeps_nothing_is_below_the_minimum() -> None:
    actual = best_threshold(np.array([3.0, 4.0]), booleans(0, 0), 3.5)
    assert actual is not None
    assert actual.value < 3.0
    assert actual.at_edge


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_number_between_two_values_separates_them(first: float, second: float) -> None:
    low, high = sorted((first, second))
    if low < high:
        assert low <= between(low, high) < high
    assert between(-math.inf, high) < high
    assert between(low, math.inf) == low
