"""Splitting attention: whole KV groups while there are enough of them, the query heads of a group beyond."""

from __future__ import annotations

from collections.abc import Sequence

from tprt.sharding.apportion import apportion, consecutive
from tprt.sharding.shape import ModelShape, Range

HeadRanges = tuple[list[Range], list[Range]]


def split_heads(shape: ModelShape, weights: Sequence[float]) -> HeadRanges:
    """Return the query heads and the KV heads of each rank."""
    if len(weights) <= shape.num_key_value_heads:
        return _whole_groups(shape, weights)
    return _shared_groups(shape, weights)


def _whole_groups(shape: ModelShape, weights: Sequence[float]) -> HeadRanges:
    counts = apportion(shape.num_key_value_heads, weights)
    group = shape.num_attention_heads // shape.num_key_value_heads
    q_heads = consecutive(counts, group, shape.num_attention_heads)
    return q_heads, consecutive(counts, 1, shape.num_key_value_heads)


def _shared_groups(shape: ModelShape, weights: Sequence[float]) -> HeadRanges:
    group = shape.num_attention_heads // shape.num_key_value_heads
    counts: list[int] = []
    kv_heads: list[Range] = []
    start = 0
    for index, ranks in enumerate(_ranks_per_group(shape.num_key_value_heads, group, weights)):
        counts += apportion(group, weights[start : start + ranks])
        kv_heads += [Range(index, index + 1)] * ranks
        start += ranks
    return consecutive(counts, 1, shape.num_attention_heads), kv_heads


def _ranks_per_group(groups: int, group: int, weights: Sequence[float]) -> list[int]:
    """Choose how many consecutive ranks share each group, so that the most loaded rank has least per weight.

    Dynamic programming over (groups served, ranks used); ties go to the smaller sum of squares.
    """
    best: dict[int, tuple[float, float, list[int]]] = {0: (0.0, 0.0, [])}
    for index in range(groups):
        later: dict[int, tuple[float, float, list[int]]] = {}
        for used, (worst, squares, runs) in best.items():
            left = len(weights) - used - (groups - index - 1)
            for ranks in range(1, min(group, left) + 1):
                run = weights[used : used + ranks]
                loads = [heads / weight for heads, weight in zip(apportion(group, run), run, strict=True)]
                option = (max(worst, *loads), squares + sum(x * x for x in loads), [*runs, ranks])
                if used + ranks not in later or option[:2] < later[used + ranks][:2]:
                    later[used + ranks] = option
        best = later
    return best[len(weights)][2]
