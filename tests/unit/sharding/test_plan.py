"""Every part of a model is held as often as it must be, by ranks that carry what their weights say."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.sharding.shapes import KNOWN, LLAMA_70B, QWEN3_8B, SMOLLM2_135M, Case, cases
from tprt.errors import ShardPlanError
from tprt.sharding import ModelShape, Range, RankShard, ShardPlan, legal_world_sizes, make_shard_plan

TINY = ModelShape(8, 6, 1, 4, 2, 2, 5, True)


def plan_of(case: Case) -> ShardPlan:
    return make_shard_plan(case.shape, case.world_size, case.rank_weights)


def assert_partition(ranges: list[Range], size: int) -> None:
    assert ranges[0].start == 0
    assert ranges[-1].stop == size
    assert all(before.stop == after.start for before, after in pairwise(ranges))
    assert all(part.size >= 1 for part in ranges)


def largest_block(plan: ShardPlan) -> int:
    """The rule for the size of MLP blocks, said in another way than the code does."""
    size = plan.shape.intermediate_size
    fit = [b for b in (64, 32, 16, 8, 4, 2) if size % b == 0 and size // b >= 8 * plan.world_size]
    return max(fit, default=1)


def unit_of_each_kind(plan: ShardPlan) -> int:
    """Weights of one KV group (one query head, where groups are shared), 64 MLP channels and 64 rows."""
    shape = plan.shape
    shared = plan.world_size > shape.num_key_value_heads
    q_heads = 1 if shared else shape.num_attention_heads // shape.num_key_value_heads
    return (
        q_heads * shape.q_head_elements
        + shape.kv_head_elements
        + 64 * (shape.mlp_channel_elements + shape.vocab_row_elements)
    )


@given(cases())
def test_every_query_head_channel_and_token_has_exactly_one_rank(case: Case) -> None:
    plan = plan_of(case)
    assert plan.world_size == case.world_size
    assert [shard.rank for shard in plan.shards] == list(range(case.world_size))
    assert_partition([shard.q_heads for shard in plan.shards], case.shape.num_attention_heads)
    assert_partition([shard.mlp_channels for shard in plan.shards], case.shape.intermediate_size)
    assert_partition([shard.vocab_rows for shard in plan.shards], case.shape.vocab_size)


@given(cases())
def test_a_rank_holds_just_the_kv_heads_that_its_query_heads_use(case: Case) -> None:
    group = case.shape.num_attention_heads // case.shape.num_key_value_heads
    for shard in plan_of(case).shards:
        used = {head // group for head in range(shard.q_heads.start, shard.q_heads.stop)}
        assert used == set(range(shard.kv_heads.start, shard.kv_heads.stop))


@given(cases())
def test_kv_heads_are_replicated_only_where_there_are_more_ranks_than_kv_heads(case: Case) -> None:
    kv_heads = [shard.kv_heads for shard in plan_of(case).shards]
    if case.world_size <= case.shape.num_key_value_heads:
        assert_partition(kv_heads, case.shape.num_key_value_heads)
    else:
        assert all(held.size == 1 for held in kv_heads)
        assert sum(held.size for held in kv_heads) == case.world_size


@given(cases())
def test_no_rank_that_could_give_away_mlp_channels_carries_more_per_weight_than_another(case: Case) -> None:
    """Moving one block from any rank to any other would not make the more loaded one of the two lighter."""
    plan = plan_of(case)
    weights = case.rank_weights or (1.0,) * case.world_size
    loads = list(zip(plan.weight_elements(), weights, strict=True))
    block = largest_block(plan)
    unit = block * case.shape.mlp_channel_elements
    for shard, (load, weight) in zip(plan.shards, loads, strict=True):
        if shard.mlp_channels.size > block:
            least = min((other + unit) / other_weight for other, other_weight in loads)
            assert load / weight <= least * (1 + 1e-9)


@given(cases())
def test_mlp_channels_come_in_blocks_and_vocabulary_rows_without_padding(case: Case) -> None:
    plan = plan_of(case)
    assert all(shard.mlp_channels.size % largest_block(plan) == 0 for shard in plan.shards)
    starts = [shard.vocab_rows.start for shard in plan.shards]
    enough_for_large_blocks = case.shape.vocab_size >= 64 * 8 * case.world_size
    assert not enough_for_large_blocks or all(start % 64 == 0 for start in starts)


@given(cases())
def test_a_rank_of_more_weight_does_not_carry_less(case: Case) -> None:
    plan = plan_of(case)
    weights = case.rank_weights or (1.0,) * case.world_size
    unit = largest_block(plan) * case.shape.mlp_channel_elements
    loads = plan.weight_elements()
    for shard, load, weight in zip(plan.shards, loads, weights, strict=True):
        if shard.mlp_channels.size > largest_block(plan):
            heavier = [
                other for other, other_weight in zip(loads, weights, strict=True) if other_weight >= weight
            ]
            assert load <= (min(heavier) + unit) * (1 + 1e-9)


@given(cases(), st.sampled_from([0.5, 4.0, 1024.0]))
def test_only_the_ratio_of_weights_matters(case: Case, factor: float) -> None:
    weights = case.rank_weights or (1.0,) * case.world_size
    scaled = [weight * factor for weight in weights]
    assert make_shard_plan(case.shape, case.world_size, scaled) == plan_of(case)


@given(cases())
def test_the_weights_of_all_ranks_add_up_to_the_model_and_its_replicas(case: Case) -> None:
    shape, plan = case.shape, plan_of(case)
    kv_heads = max(shape.num_key_value_heads, case.world_size)
    attention = 2 * (shape.num_attention_heads + kv_heads) * shape.head_dim * shape.hidden_size
    mlp = 3 * shape.intermediate_size * shape.hidden_size
    vocabulary = shape.vocab_size * shape.hidden_size * (1 if shape.tie_word_embeddings else 2)
    assert sum(plan.weight_elements()) == shape.num_hidden_layers * (attention + mlp) + vocabulary


@pytest.mark.parametrize(("shape", "world_size"), KNOWN)
def test_equal_ranks_of_a_known_model_differ_by_less_than_a_unit_of_each_kind(
    shape: ModelShape, world_size: int
) -> None:
    plan = make_shard_plan(shape, world_size)
    loads = plan.weight_elements()
    assert max(loads) - min(loads) < unit_of_each_kind(plan)
    assert max(loads) * world_size <= 1.05 * sum(loads)


@pytest.mark.parametrize(("shape", "world_size"), KNOWN)
@pytest.mark.parametrize("pattern", [(80, 48), (80, 80, 48), (24, 48, 96, 80)])
def test_unequal_ranks_of_a_known_model_carry_their_share_within_a_unit_of_each_kind(
    shape: ModelShape, world_size: int, pattern: tuple[int, ...]
) -> None:
    weights = [pattern[rank % len(pattern)] for rank in range(world_size)]
    plan = make_shard_plan(shape, world_size, weights)
    loads = plan.weight_elements()
    for load, weight in zip(loads, weights, strict=True):
        assert abs(load - sum(loads) * weight / sum(weights)) < unit_of_each_kind(plan)


def test_smollm2_on_two_ranks_has_two_kv_groups_on_one_and_more_mlp_on_the_other() -> None:
    assert make_shard_plan(SMOLLM2_135M, 2).shards == (
        RankShard(0, Range(0, 6), Range(0, 2), Range(0, 704), Range(0, 24576)),
        RankShard(1, Range(6, 9), Range(2, 3), Range(704, 1536), Range(24576, 49152)),
    )


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_a_model_that_divides_evenly_is_divided_evenly(world_size: int) -> None:
    for shard in make_shard_plan(QWEN3_8B, world_size).shards:
        assert shard.q_heads.size == 32 // world_size
        assert shard.kv_heads.size == 8 // world_size
        assert shard.mlp_channels.size == 12288 // world_size
        assert abs(shard.vocab_rows.size - 151936 / world_size) < 64


def test_kv_groups_follow_the_weights_of_unequal_gpus() -> None:
    plan = make_shard_plan(LLAMA_70B, 3, [80, 80, 48])
    assert [shard.kv_heads.size for shard in plan.shards] == [3, 3, 2]


def test_one_rank_holds_the_whole_model() -> None:
    assert make_shard_plan(TINY, 1).shards == (
        RankShard(0, Range(0, 4), Range(0, 2), Range(0, 6), Range(0, 5)),
    )


def test_as_many_ranks_as_query_heads_have_one_each() -> None:
    plan = make_shard_plan(SMOLLM2_135M, 9)
    assert [shard.q_heads for shard in plan.shards] == [Range(head, head + 1) for head in range(9)]
    assert [shard.kv_heads.start for shard in plan.shards] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("world_size", [-1, 0, 10, 16])
def test_a_world_size_that_does_not_fit_is_refused_with_those_that_do(world_size: int) -> None:
    said = rf"tensor_parallel_size {world_size} cannot split 9 query heads.*legal sizes.*: 1 to 9"
    with pytest.raises(ShardPlanError, match=said):
        make_shard_plan(SMOLLM2_135M, world_size)


@pytest.mark.parametrize(
    ("shape", "most"),
    [
        (SMOLLM2_135M, 9),
        (LLAMA_70B, 64),
        (ModelShape(8, 3, 1, 4, 2, 2, 5, True), 3),
        (ModelShape(8, 6, 1, 4, 2, 2, 2, True), 2),
    ],
)
def test_every_legal_world_size_has_a_plan_and_the_next_has_none(shape: ModelShape, most: int) -> None:
    assert legal_world_sizes(shape) == range(1, most + 1)
    for world_size in legal_world_sizes(shape):
        assert make_shard_plan(shape, world_size).world_size == world_size
    with pytest.raises(ShardPlanError, match=f"1 to {most}"):
        make_shard_plan(shape, most + 1)


@pytest.mark.parametrize(
    "weights", [[], [1.0], [1.0, 1.0, 1.0], [1.0, 0.0], [1.0, -2.0], [1.0, math.nan], [1.0, math.inf]]
)
def test_weights_that_make_no_sense_are_refused(weights: list[float]) -> None:
    with pytest.raises(ShardPlanError, match=r"rank_weights .* expected 2 finite numbers above 0") as error:
        make_shard_plan(SMOLLM2_135M, 2, weights)
    assert str(weights) in str(error.value)


@pytest.mark.parametrize("weights", [[1e-300, 1e300], [5e-324, 1.0], [1e308, 1e308]])
def test_weights_at_the_end_of_the_scale_still_make_a_whole_plan(weights: list[float]) -> None:
    plan = make_shard_plan(SMOLLM2_135M, 2, weights)
    assert_partition([shard.mlp_channels for shard in plan.shards], 1536)
    assert_partition([shard.vocab_rows for shard in plan.shards], 49152)
