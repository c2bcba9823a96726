"""The k-th smallest value of a column that is not held in memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.scoring.order_statistics import kth_smallest


@given(st.lists(st.floats(), min_size=1, max_size=40), st.data())
def test_kth_smallest_equals_sorting(values: list[float], data: st.DataObject) -> None:
    k = data.draw(st.integers(0, len(values) - 1))
    middle = data.draw(st.integers(0, len(values)))
    array = np.array(values)
    actual = kth_smallest(lambda: iter([array[:middle], array[middle:]]), k)
    expected = np.sort(array)[k]  # numpy puts NaN last
    assert (math.isnan(actual) and math.isnan(expected)) or actual == expected


def test_kth_smallest_beyond_the_column_raises() -> None:
    with pytest.raises(IndexError):
        kth_smallest(lambda: iter([np.array([1.0])]), 1)
