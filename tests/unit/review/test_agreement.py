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


def of(*values: int) -> np.ndarray:
    return np.array(values, dtype=bool)


def test_kappa_by_hand() -> None:
    # Cohen's textbook case: 20 both yes, 5 only A, 10 only B, 15 both no; p_o = 0.7, p_e = 0.5, kappa = 0.4.
    filter_keeps = of(*[1] * 20, *[1] * 5, *[0] * 10, *[0] * 15)
    person_keeps = of(*[1] * 20, *[0] * 5, *[1] * 10, *[0] * 15)
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
    assert agreement(of(1, 0), of(1, 0))["kappa"] == 1.0
    assert agreement(of(1, 0), of(0, 1))["kappa"] == -1.0
    assert agreement(of(1, 1), of(1, 1))["kappa"] is None
    assert agreement(of(1, 0), of(1, 1))["kappa"] == 0.0


@given(BOOLS)
def test_agreement_is_symmetric(pairs: list[tuple[bool, bool]]) -> None:
    one, other = (np.array(values, dtype=bool) for values in zip(*pairs, strict=True))
    there, back = agreement(one, other), agreement(other, one)
    assert there["share"] == back["share"] == np.mean(one == other)
    assert there["kappa"] == back["kappa"]
    assert there["kappa"] is None or -1 <= there["kappa"] <= 1


@given(st.lists(st.tuples(SCORES, st.booleans()), min_size=1, max_size=40), st.floats(-10, 10))
def test_best_threshold_is_optimal(rows: list[tuple[float, bool]], now: float) -> None:
    badness, person = np.array([score for score, _ in rows]), np.array([keeps for _, keeps in rows])
    best = best_threshold(badness, person, now)
    finite = badness[np.isfinite(badness)]
    if not len(finite):
        assert best is None
        return
    assert best is not None
    tried = [-math.inf, *finite]
    shares = [float(np.mean((np.isfinite(badness) & (badness <= value)) == person)) for value in tried]
    assert best.agreement == pytest.approx(max(shares))
    assert np.mean((np.isfinite(badness) & (badness <= best.value)) == person) == pytest.approx(best.agreement)
    here = float(np.mean((np.isfinite(badness) & (badness <= now)) == person))
    assert best.value == now or here < best.agreement or not np.isfinite(best.value), (
        "the current threshold is kept unless another one is better"
    )


@pytest.mark.parametrize(
    ("badness", "person", "now", "value", "share", "at_edge"),
    [
        ([1, 2, 3, 4], [1, 1, 0, 0], 2.5, 2.5, 1.0, False),  # the cut is as good as any: it stays
        ([1, 2, 3, 4], [1, 1, 1, 0], 2.5, 3.5, 1.0, False),
        ([1, 2, 3, 4], [1, 1, 1, 1], 2.5, 4.0, 1.0, True),  # nothing is known beyond 4
        ([10, 20, 30], [1, 0, 0], 25.0, 15.0, 1.0, False),
        ([1, 2, 3, 4, 5], [1, 0, 1, 0, 0], 4.5, 3.5, 0.8, False),  # of two equally good ones the nearer
        ([1, 2, 3, 4, 5], [1, 0, 1, 0, 0], 0.5, 1.5, 0.8, False),
        ([1, 2, math.inf], [1, 1, 0], 2.0, 2.0, 1.0, True),  # a row without a score is dropped by every threshold
        ([41.16, 43.9], [1, 0], 60.0, 42.5, 1.0, False),  # as few digits as do
        ([1, 2], [1, 1], math.inf, math.inf, 1.0, True),  # a filter that drops nothing
    ],
)
def test_best_threshold_by_hand(
    badness: list[float], person: list[int], now: float, value: float, share: float, at_edge: bool
) -> None:
    actual = best_threshold(np.array(badness, dtype=float), of(*person), now)
    assert actual is not None
    assert (actual.value, actual.agreement, actual.at_edge) == (value, pytest.approx(share), at_edge)


def test_best_threshold_that_keeps_nothing_is_below_the_minimum() -> None:
    actual = best_threshold(np.array([3.0, 4.0]), of(0, 0), 3.5)
    assert actual is not None
    assert actual.value < 3.0
    assert actual.at_edge


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_number_between_two_values_separates_them(one: float, other: float) -> None:
    low, high = sorted((one, other))
    if low < high:
        assert low <= between(low, high) < high
    assert between(-math.inf, high) < high
    assert between(low, math.inf) == low
