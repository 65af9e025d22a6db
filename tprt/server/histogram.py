"""Counts of values by size, at the price of a binary search for each: what Prometheus calls a histogram.

Knows nothing of what is counted and of how it is written out.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Histogram:
    """Counts by upper bound, and the sum of all values.

    One thread adds; another that reads meanwhile sees a value in the counts before it is in the sum.

    Attributes:
        bounds: `[n]` upper bounds, rising; a value that equals one counts as below it.
        counts: `[n + 1]` values up to each bound and above the one before; the last are above all bounds.
        sum: of all values.
    """

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` over."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    def merge(self, other: Histogram) -> None:
        """Count what `other`, of the same bounds, has counted."""
        self.counts = [mine + theirs for mine, theirs in zip(self.counts, other.counts, strict=True)]
        self.sum += other.sum
