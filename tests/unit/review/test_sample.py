"""Sampling of rows for a review."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.review.filter_results import ranks_from_threshold
from tunery.review.sample import BANDS, Sample, allocate_evenly, sample_rows
from tunery.selection.thresholds import find_threshold
from tunery.spec import Keep


def distances(kept: int, dropped: int) -> np.ndarray:
    """Return the distances of rows in the order of their scores; -0.5 is that of the last kept row."""
    return np.arange(kept + dropped) - kept + 0.5


def sample_of(kept: int, dropped: int, rows: int, seed: int = 17, sources: list[str] | None = None) -> Sample:
    n = kept + dropped
    return sample_rows(
        [f"{index:016x}" for index in range(n)], sources or ["a"] * n, distances(kept, dropped), rows, seed
    )


@given(st.dictionaries(st.integers(0, 20), st.integers(0, 30), min_size=1, max_size=6), st.integers(0, 100))
def test_allocation_is_as_even_as_capacities_allow(capacities: dict[int, int], total: int) -> None:
    shares = allocate_evenly(capacities, total)
    assert sum(shares.values()) == min(total, sum(capacities.values()))
    assert all(shares[key] <= capacities[key] for key in capacities)
    # Keys with remaining capacity got the maximum allocation, up to a remainder of one.
    unfilled = [shares[key] for key in capacities if shares[key] < capacities[key]]
    assert not unfilled or min(unfilled) >= max(shares.values()) - 1


def test_allocation_by_hand() -> None:
    assert allocate_evenly({"a": 10, "b": 10}, 5) == {"a": 3, "b": 2}
    assert allocate_evenly({"a": 1, "b": 10, "c": 0}, 8) == {"a": 1, "b": 7, "c": 0}
    assert allocate_evenly({"a": 2, "b": 2}, 100) == {"a": 2, "b": 2}


@given(st.integers(0, 200), st.integers(0, 200), st.integers(1, 120), st.integers(0, 3))
def test_sample_has_the_requested_number_of_distinct_rows_or_all(kept: int, dropped: int, rows: int, seed: int) -> None:
    sample = sample_of(kept, dropped, rows, seed)
    ids = [row.id for row in sample.rows]
    assert len(ids) == len(set(ids)) == min(rows, kept + dropped)
    for row in sample.rows:
        assert (row.stratum.side == "kept") == (row.index < kept)
        assert row.id == f"{row.index:016x}"
    requested = Counter(row.stratum for row in sample.rows)
    assert all(requested[stratum] <= available for stratum, available in sample.available.items())


def test_both_sides_and_all_bands_are_sampled_evenly() -> None:
    sample = sample_of(600, 400, 60)
    assert Counter(row.stratum.side for row in sample.rows) == {"kept": 30, "dropped": 30}
    assert set(Counter((row.stratum.side, row.stratum.band) for row in sample.rows).values()) == {10}


def test_sampled_rows_are_near_the_threshold_in_large_data() -> None:
    large = sample_of(70_000, 30_000, 60)
    max_distance = max(abs(distances(70_000, 30_000)[row.index]) for row in large.rows)
    assert 6_000 < max_distance <= 15_000, "sampled rows must be within 15% of all rows, but not only at the threshold"
    small = sample_of(60, 40, 30)
    assert max(abs(distances(60, 40)[row.index]) for row in small.rows) <= 35


def test_bands_have_increasing_distances() -> None:
    sample = sample_of(600, 400, 60)
    distances_by_band = {
        band: [abs(distances(600, 400)[row.index]) for row in sample.rows if row.stratum.band == band] for band in BANDS
    }
    assert max(distances_by_band["nearest"]) < min(distances_by_band["near"])
    assert max(distances_by_band["near"]) < min(distances_by_band["farther"])


def test_rows_that_a_small_side_lacks_are_sampled_from_the_other() -> None:
    sample = sample_of(195, 5, 40)
    assert Counter(row.stratum.side for row in sample.rows) == {"kept": 35, "dropped": 5}


def test_every_source_is_sampled() -> None:
    sources = ["large"] * 1000
    sources[495], sources[505] = "small", "small"
    sample = sample_of(500, 500, 60, sources=sources)
    assert Counter(row.stratum.source for row in sample.rows)["small"] == 2


def test_sample_depends_only_on_arguments_and_seed() -> None:
    assert sample_of(600, 400, 60) == sample_of(600, 400, 60)
    first, second = ({row.id for row in sample_of(600, 400, 60, seed).rows} for seed in (17, 18))
    assert first != second
    assert [row.id for row in sample_of(600, 400, 60).rows] != sorted(row.id for row in sample_of(600, 400, 60).rows)


def test_order_mixes_the_sides() -> None:
    sides = [row.stratum.side for row in sample_of(600, 400, 60).rows]
    changes = sum(side != following for side, following in itertools.pairwise(sides))
    assert changes > 15, "the position of a row reveals its outcome"


def test_copies_of_a_row_are_sampled_once() -> None:
    ids = ["a", "b", "a", "c", "b", "d"]
    sample = sample_rows(ids, ["s"] * 6, distances(3, 3), 6, 17)
    assert sorted(row.id for row in sample.rows) == ["a", "b", "c", "d"]
    assert sum(sample.available.values()) == 4


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.0, 3.0, np.inf]), min_size=1, max_size=30),
    st.floats(0.05, 1.0) | st.none(),
    st.sampled_from([0.5, 1.0, 2.5]),
)
def test_rank_is_negative_exactly_for_rows_that_pass(
    scores: list[float], quantile: float | None, threshold: float
) -> None:
    badness = np.array(scores)
    rule = Keep(keep_fraction=quantile) if quantile else Keep(threshold=threshold)
    passed = find_threshold(lambda: iter([badness]), rule, "low", len(badness), None).mask(badness)
    ranks = ranks_from_threshold(badness, passed)
    assert ((ranks < 0) == passed).all()
    assert sorted(ranks) == pytest.approx(np.arange(len(scores)) - passed.sum() + 0.5)
