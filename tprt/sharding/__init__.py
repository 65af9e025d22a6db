"""The ShardPlan: which part of the model each rank holds. Pure functions of shape, world size and weights."""

from tprt.sharding.plan import ShardPlan, legal_world_sizes, make_shard_plan
from tprt.sharding.shape import ModelShape, Range, RankShard, shape_of

__all__ = ["ModelShape", "Range", "RankShard", "ShardPlan", "legal_world_sizes", "make_shard_plan", "shape_of"]
