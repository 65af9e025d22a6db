"""Counts of values by size."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tprt.server.histogram import Histogram


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 5))))
def test_every_value_is_counted_below_the_first_bound_that_it_does_not_exceed(
    values: list[tuple[float, int]],
) -> None:
    histogram = Histogram((1, 5, 25))
    for value, times in values:
        histogram.add(value, times)
    weighted = [value for value, times in values for _ in range(times)]
    ranges = [(-1.0, 1.0), (1.0, 5.0), (5.0, 25.0), (25.0, 1e9)]
    assert histogram.counts == [sum(low < value <= high for value in weighted) for low, high in ranges]
    assert abs(histogram.sum - sum(weighted)) <= 1e-6 * max(1.0, sum(weighted))
