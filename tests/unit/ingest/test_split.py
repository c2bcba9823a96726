"""Splits by group name: stable, disjoint, and of the requested sizes."""

from __future__ import annotations

import hashlib
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.ingest.split import MAX_EVAL_FRACTION, split_of

HOLDOUTS = st.floats(min_value=0, max_value=MAX_EVAL_FRACTION)
RELEASED = {"print": "validation", "json": "test", "os.path.join": "train", "abs": "train", "ü": "validation"}
NAMES = [f"group {number}" for number in range(4000)]


@pytest.mark.parametrize("eval_fraction", [0.0, 0.05, 0.2, 0.45])
def test_validation_and_test_get_the_holdout_each(eval_fraction: float) -> None:
    sizes = Counter(split_of(name, eval_fraction) for name in NAMES)
    assert sizes["test"] / len(NAMES) == pytest.approx(eval_fraction, abs=0.03)
    assert sizes["validation"] / len(NAMES) == pytest.approx(eval_fraction, abs=0.03)
    assert sizes["train"] + sizes["test"] + sizes["validation"] == len(NAMES)


@given(st.text(), HOLDOUTS, HOLDOUTS)
def test_larger_holdout_moves_groups_only_out_of_train(group: str, one: float, other: float) -> None:
    smaller, larger = sorted((one, other))
    before, after = split_of(group, smaller), split_of(group, larger)
    assert after == before or before == "train"


@given(st.text())
def test_nothing_is_held_out_without_a_holdout(group: str) -> None:
    assert split_of(group, 0) == "train"


def test_splits_stay_what_they_were_in_earlier_releases() -> None:
    # A change here would put rows that a stored run trained on among the ones that a new run is tested on.
    assert {name: split_of(name, 0.2) for name in RELEASED} == RELEASED


def test_first_groups_by_hash_fall_into_all_splits() -> None:
    first = sorted(NAMES, key=lambda name: hashlib.sha256(name.encode()).digest())[:400]
    sizes = Counter(split_of(name, 0.25) for name in first)
    assert min(sizes["train"], sizes["validation"], sizes["test"]) > 60


@pytest.mark.parametrize("eval_fraction", [-0.01, 0.46, 1.0, float("nan")])
def test_impossible_holdout_is_refused(eval_fraction: float) -> None:
    with pytest.raises(ValueError, match="eval_fraction is"):
        split_of("print", eval_fraction)
