"""Sharing out whole units in proportion to weights. Knows nothing of models."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from tprt.sharding.shape import Range


def apportion(units: int, weights: Sequence[float]) -> list[int]:
    """Give every weight at least one of `units` and otherwise keep the largest share per weight small."""
    return fill_up(units, [0.0] * len(weights), 1.0, weights)


def fill_up(units: int, loads: Sequence[float], unit_load: float, weights: Sequence[float]) -> list[int]:
    """Share out `units` so that loads per weight end as equal as they can, at least one unit each.

    Each unit goes to the rank that has least per weight with it, so no rank ends above another by more than
    one unit's load per weight, unless it began there.

    Args:
        units: how many there are; at least one for each weight.
        loads: what each rank carries already.
        unit_load: what a unit adds.
        weights: the rank's share of everything.
    """
    counts = [1] * len(weights)

    def entry(rank: int) -> tuple[float, int]:
        return (loads[rank] + (counts[rank] + 1) * unit_load) / weights[rank], rank

    heap = [entry(rank) for rank in range(len(weights))]
    heapq.heapify(heap)
    for _ in range(units - len(weights)):
        rank = heap[0][1]
        counts[rank] += 1
        heapq.heapreplace(heap, entry(rank))
    return counts


def consecutive(counts: Sequence[int], scale: int, limit: int) -> list[Range]:
    """Turn counts of blocks of `scale` items into consecutive ranges that end at `limit`."""
    ranges, start = [], 0
    for count in counts:
        stop = min(start + count * scale, limit)
        ranges.append(Range(start, stop))
        start = stop
    return ranges


def block_size_for(size: int, world_size: int, blocks_per_rank: int, must_divide: bool) -> int:
    """Return the largest power of two up to 64 that leaves every rank enough blocks to balance with."""
    block = 64
    while block > 1 and (size // block < blocks_per_rank * world_size or (must_divide and size % block)):
        block //= 2
    return block
