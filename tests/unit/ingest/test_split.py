"""Splits by group name: stable, disjoint, and of the requested sizes."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.ingest.split import MAX_EVAL_FRACTION, split_of

EVAL_FRACTIONS = st.floats(min_value=0, max_value=MAX_EVAL_FRACTION)
EXPECTED_SPLITS = {"print": "validation", "json": "test", "os.path.join": "train", "abs": "train", "ü": "validation"}
NAMES = [f"group {number}" for number in range(4000)]


@pytest.mark.parametrize("eval_fraction", [0.0, 0.05, 0.2, 0.45])
def test_validation_and_test_each_get_the_eval_fraction(eval_fraction: float) -> None:
    sizes = Counter(split_of(name, eval_fraction) for name in NAMES)
    assert sizes["test"] / len(NAMES) == pytest.approx(eval_fraction, abs=0.03)
    assert sizes["validation"] / len(NAMES) == pytest.approx(eval_fraction, abs=0.03)
    assert sizes["train"] + sizes["test"] + sizes["validation"] == len(NAMES)


@given(st.text(), EVAL_FRACTIONS, EVAL_FRACTIONS)
def test_larger_eval_fraction_only_moves_groups_out_of_train(
    group: str, first_fraction: float, second_fraction: float
) -> None:
    smaller, larger = sorted((first_fraction, second_fraction))
    before, after = split_of(group, smaller), split_of(group, larger)
    assert after == before or before == "train"


@given(st.text())
def test_zero_eval_fraction_puts_all_groups_in_train(group: str) -> None:
    assert split_of(group, 0) == "train"


def test_splits_do_not_change_between_releases() -> None:
    # A change here would put training rows of a stored run into the test split of a new run.
    assert {name: split_of(name, 0.2) for name in EXPECTED_SPLITS} == EXPECTED_SPLITS


def test_first_groups_in_hash_order_are_in_all_splits() -> None:
    first = sorted(NAMES, key=lambda name: hashlib.sha256(name.encode()).digest())[:400]
    sizes = Counter(split_of(name, 0.25) for name in first)
    assert min(sizes["train"], sizes["validation"], sizes["test"]) > 60


@pytest.mark.parametrize("eval_fraction", [-0.01, 0.46, 1.0, float("nan")])
def test_invalid_eval_fraction_is_rejected(eval_fraction: float) -> None:
    with pytest.raises(ValueError, match="eval_fraction is"):
        split_of("print", eval_fraction)
