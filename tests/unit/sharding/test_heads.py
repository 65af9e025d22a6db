"""No other way to give query heads to ranks leaves the most loaded rank with less per weight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.sharding.shapes import QWEN2_5_0_5B, SMOLLM2_135M
from tprt.sharding import ModelShape
from tprt.sharding.heads import split_heads


def shape_with(kv_heads: int, group: int) -> ModelShape:
    return ModelShape(8, 64, 1, kv_heads * group, kv_heads, 2, 64, True)


def compositions(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    """Yield every way to write `total` as a sum of `parts` numbers of at least one."""
    for cuts in combinations(range(1, total), parts - 1):
        yield tuple(stop - start for start, stop in pairwise((0, *cuts, total)))


def most_loaded(counts: Sequence[int], weights: Sequence[float]) -> float:
    return max(count / weight for count, weight in zip(counts, weights, strict=True))


def best_of_all(kv_heads: int, group: int, weights: Sequence[float]) -> float:
    """Try every run of ranks for every group, and every split of each group's heads."""
    best = float("inf")
    for runs in compositions(len(weights), kv_heads):
        worst, start = 0.0, 0
        for ranks in runs:
            run = weights[start : start + ranks]
            splits = [most_loaded(split, run) for split in compositions(group, ranks)]
            worst = max(worst, min(splits, default=float("inf")))
            start += ranks
        best = min(best, worst)
    return best


@st.composite
def shared_groups(draw: st.DrawFn) -> tuple[int, int, list[float]]:
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(2, 5))
    world_size = draw(st.integers(kv_heads + 1, min(kv_heads * group, 7)))
    weight = st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0])
    return kv_heads, group, draw(st.lists(weight, min_size=world_size, max_size=world_size))


@given(shared_groups())
def test_shared_groups_are_split_as_well_as_trying_everything_would(
    case: tuple[int, int, list[float]],
) -> None:
    kv_heads, group, weights = case
    q_heads, _ = split_heads(shape_with(kv_heads, group), weights)
    found = most_loaded([heads.size for heads in q_heads], weights)
    assert found == pytest.approx(best_of_all(kv_heads, group, weights))


@given(st.integers(1, 8), st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0, 8.0]), min_size=1, max_size=5))
def test_whole_groups_are_shared_out_as_well_as_trying_everything_would(
    spare: int, weights: list[float]
) -> None:
    kv_heads = len(weights) + spare
    _, kv = split_heads(shape_with(kv_heads, 2), weights)
    found = most_loaded([heads.size for heads in kv], weights)
    assert found == min(most_loaded(split, weights) for split in compositions(kv_heads, len(weights)))


@pytest.mark.parametrize(
    ("shape", "world_size", "q_heads", "kv_starts"),
    [
        (SMOLLM2_135M, 2, [6, 3], [0, 2]),
        (SMOLLM2_135M, 6, [2, 1, 2, 1, 2, 1], [0, 0, 1, 1, 2, 2]),
        (QWEN2_5_0_5B, 2, [7, 7], [0, 1]),
        (QWEN2_5_0_5B, 4, [4, 3, 4, 3], [0, 0, 1, 1]),
        (QWEN2_5_0_5B, 7, [3, 2, 2, 2, 2, 2, 1], [0, 0, 0, 1, 1, 1, 1]),
    ],
)
def test_heads_of_known_models(
    shape: ModelShape, world_size: int, q_heads: list[int], kv_starts: list[int]
) -> None:
    q, kv = split_heads(shape, [1.0] * world_size)
    assert [heads.size for heads in q] == q_heads
    assert [heads.start for heads in kv] == kv_starts


def test_of_two_ranks_that_share_a_group_the_stronger_has_more_heads() -> None:
    q_heads, _ = split_heads(shape_with(1, 8), [1.0, 3.0])
    assert [heads.size for heads in q_heads] == [2, 6]


def test_a_group_is_split_by_the_weights_of_its_own_ranks() -> None:
    q_heads, kv_heads = split_heads(shape_with(2, 8), [4.0, 4.0, 1.0, 7.0])
    assert [heads.size for heads in q_heads] == [4, 4, 1, 7]
    assert [heads.start for heads in kv_heads] == [0, 0, 1, 1]
