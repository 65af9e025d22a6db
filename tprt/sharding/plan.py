"""From a model's shape, a world size and the ranks' weights to the part of each rank.

Attention is split by KV groups, or by query heads with the KV head replicated where there are more ranks than
KV heads; the vocabulary by blocks of rows; the MLP by blocks of channels, which make up for what the other
two could not balance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tprt.errors import ShardPlanError
from tprt.sharding.apportion import apportion, block_size_for, consecutive, fill_up
from tprt.sharding.heads import split_heads
from tprt.sharding.shape import ModelShape, Range, RankShard

RankWeights = Sequence[float] | Literal["auto"] | None

_MLP_BLOCKS_PER_RANK = 8
_VOCAB_BLOCKS_PER_RANK = 8


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """The part of every rank."""

    shape: ModelShape
    shards: tuple[RankShard, ...]

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.shards)

    def weight_elements(self) -> list[int]:
        """Return how many weights of split matrices each rank holds."""
        return [shard.weight_elements(self.shape) for shard in self.shards]


def make_shard_plan(shape: ModelShape, world_size: int, rank_weights: RankWeights = None) -> ShardPlan:
    """Split the model over `world_size` ranks in proportion to `rank_weights` (equal shares if None).

    Every rank must split by the same numbers, so `auto` has to be resolved before ranks are started.

    Raises:
        ShardPlanError: the model cannot be split so, or the weights make no sense; says what is legal.
    """
    _check_world_size(shape, world_size)
    weights = _checked_weights(world_size, rank_weights)
    q_heads, kv_heads = split_heads(shape, weights)
    vocab_rows = _split_vocabulary(shape, weights)
    loads = [
        q.size * shape.q_head_elements + kv.size * shape.kv_head_elements + rows.size * shape.vocab_row_elements
        for q, kv, rows in zip(q_heads, kv_heads, vocab_rows, strict=True)
    ]
    mlp_channels = _split_mlp(shape, weights, loads)
    parts = zip(q_heads, kv_heads, mlp_channels, vocab_rows, strict=True)
    return ShardPlan(shape, tuple(RankShard(rank, *part) for rank, part in enumerate(parts)))


def legal_world_sizes(shape: ModelShape) -> range:
    """Return the world sizes that the model can be split over."""
    return range(1, min(shape.num_attention_heads, shape.intermediate_size, shape.vocab_size) + 1)


def _check_world_size(shape: ModelShape, world_size: int) -> None:
    legal = legal_world_sizes(shape)
    if world_size not in legal:
        raise ShardPlanError(
            f"tensor_parallel_size {world_size} cannot split {shape.num_attention_heads} query heads,"
            f" {shape.intermediate_size} MLP channels and {shape.vocab_size} tokens: every rank needs one of"
            f" each; legal sizes for this model: {legal[0]} to {legal[-1]}"
        )


def _checked_weights(world_size: int, rank_weights: RankWeights) -> list[float]:
    if rank_weights is None:
        return [1.0] * world_size
    if rank_weights == "auto":
        raise ShardPlanError(
            "rank_weights is auto, and nobody has looked up the memory of the devices; give one number for each"
            " rank, or start from LLM or the command line, which look it up"
        )
    weights = [float(weight) for weight in rank_weights]
    if len(weights) != world_size or not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise ShardPlanError(
            f"rank_weights {list(rank_weights)} for tensor_parallel_size {world_size}; expected {world_size}"
            " finite numbers above 0, one for each rank"
        )
    return weights


def _split_vocabulary(shape: ModelShape, weights: Sequence[float]) -> list[Range]:
    block = block_size_for(shape.vocab_size, len(weights), _VOCAB_BLOCKS_PER_RANK, must_divide=False)
    counts = apportion(-(-shape.vocab_size // block), weights)
    return consecutive(counts, block, shape.vocab_size)


def _split_mlp(shape: ModelShape, weights: Sequence[float], loads: Sequence[int]) -> list[Range]:
    block = block_size_for(shape.intermediate_size, len(weights), _MLP_BLOCKS_PER_RANK, must_divide=True)
    counts = fill_up(shape.intermediate_size // block, loads, block * shape.mlp_channel_elements, weights)
    return consecutive(counts, block, shape.intermediate_size)
