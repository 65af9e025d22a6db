"""What each rank of a deployment will hold, found without loading anything.

The model of every rank is built on torch's meta device, which has shapes and no memory, so weight bytes are
those that a start allocates, whatever the architecture. Knows nothing of how the result is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from launch.planning.memory import RankMemory
from tprt.attention import make_attention_backend
from tprt.checkpoint_config import CheckpointConfig, read_checkpoint_config, resolve_max_model_len
from tprt.config import Config
from tprt.distributed import TPGroup
from tprt.models import ModelParts, build_model
from tprt.sharding import RankShard, ShardPlan, legal_world_sizes, make_shard_plan, shape_of
from tprt.worker.kv_cache import cpu_budget, kv_block_bytes
from tprt.worker.memory_budget import MemoryBudget
from tprt.worker.model_runner import resolve_dtype
from tprt.worker.workspace import estimate_workspace, rotary_table_bytes


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank's part: heads, channels and rows, and bytes.

    `budget` is where the memory of its device goes, None where that is not known; `num_blocks` is what fits
    into it, or what is set.
    """

    shard: RankShard
    weight_bytes: int
    kv_bytes_per_token: int
    budget: MemoryBudget | None
    num_blocks: int | None


@dataclass(frozen=True, slots=True)
class DeploymentPlan:
    """All ranks, and what they have in common."""

    ranks: tuple[RankPlan, ...]
    shards: ShardPlan
    device: str
    dtype: torch.dtype
    block_size: int
    max_model_len: int
    legal_world_sizes: tuple[int, int]

    @property
    def imbalance(self) -> float:
        """The heaviest rank's weight bytes over the mean."""
        sizes = [rank.weight_bytes for rank in self.ranks]
        return max(sizes) * len(sizes) / sum(sizes)

    @property
    def num_blocks(self) -> int | None:
        """The KV blocks of every rank: what the poorest holds."""
        known = [rank.num_blocks for rank in self.ranks if rank.num_blocks is not None]
        return min(known) if len(known) == len(self.ranks) else None

    @property
    def num_tokens(self) -> int | None:
        """The tokens that the KV blocks hold."""
        return None if self.num_blocks is None else self.num_blocks * self.block_size

    @property
    def max_full_sequences(self) -> int | None:
        """Sequences of `max_model_len` tokens that fit at a time: the largest batch at the maximum length."""
        if self.num_blocks is None:
            return None
        return self.num_blocks // -(-self.max_model_len // self.block_size)


def planned_device(config: Config) -> torch.device:
    """Return the type of device that is planned for, whether or not this machine has one."""
    setting = config.runtime.device
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(setting)


def plan_deployment(config: Config, memory: Sequence[RankMemory] | None = None) -> DeploymentPlan:
    """Plan the deployment of `config`, whose `rank_weights` are numbers, on CUDA devices with `memory`.

    A number of KV blocks that is set, and the memory of CPU ranks, come from `config`; `memory` has an entry
    for each rank, or is None where nothing is known of it.

    Raises:
        CheckpointError, ConfigError, ShardPlanError, UnsupportedModelError: it cannot be deployed.
    """
    checkpoint = read_checkpoint_config(config.model.path)
    shape = shape_of(checkpoint)
    plan = make_shard_plan(shape, config.parallel.tensor_parallel_size, config.parallel.rank_weights)
    device = planned_device(config)
    dtype = resolve_dtype(config, checkpoint, device)
    legal = legal_world_sizes(shape)
    known: Sequence[RankMemory | None] = [None] * plan.world_size if memory is None else memory
    ranks = zip(plan.shards, known, strict=True)
    return DeploymentPlan(
        ranks=tuple(_plan_rank(config, checkpoint, shard, dtype, rank_memory) for shard, rank_memory in ranks),
        shards=plan,
        device=device.type,
        dtype=dtype,
        block_size=config.cache.block_size,
        max_model_len=resolve_max_model_len(checkpoint, config.model.max_model_len),
        legal_world_sizes=(legal[0], legal[-1]),
    )


def _plan_rank(
    config: Config,
    checkpoint: CheckpointConfig,
    shard: RankShard,
    dtype: torch.dtype,
    memory: RankMemory | None,
) -> RankPlan:
    model = shape_model(config, checkpoint, shard, dtype)
    weight_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    block_bytes = kv_block_bytes(checkpoint, shard, config.cache.block_size, dtype)
    budget: MemoryBudget | None = None
    if planned_device(config).type == "cpu":
        budget = cpu_budget(config.cache)
    elif memory is not None:
        budget = cuda_budget(config, shard, dtype, memory, weight_bytes)
    num_blocks = config.cache.num_blocks
    if num_blocks is None and budget is not None:
        num_blocks = budget.num_blocks(block_bytes)
    return RankPlan(
        shard=shard,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=block_bytes // config.cache.block_size,
        budget=budget,
        num_blocks=num_blocks,
    )


def cuda_budget(
    config: Config, shard: RankShard, dtype: torch.dtype, memory: RankMemory, weight_bytes: int
) -> MemoryBudget:
    """Return where the memory of a CUDA rank will go."""
    checkpoint = read_checkpoint_config(config.model.path)
    max_model_len = resolve_max_model_len(checkpoint, config.model.max_model_len)
    return MemoryBudget(
        total=memory.total,
        limit=int(memory.total * config.cache.memory_fraction),
        others=memory.others,
        weights=weight_bytes + rotary_table_bytes(checkpoint, max_model_len),
        workspace=estimate_workspace(checkpoint, shard, config.scheduler, dtype, max_model_len),
    )


def capacity_warnings(planned: DeploymentPlan) -> list[str]:
    """Say what does not fit into the KV blocks."""
    if planned.num_blocks is None or planned.max_full_sequences:
        return []
    if not planned.num_blocks:
        poorest = [rank.shard.rank for rank in planned.ranks if not rank.num_blocks]
        return [
            f"no KV block fits on ranks {poorest}: use more ranks, or raise cache.memory_fraction, or"
            " cache.cpu_memory_gib on CPUs"
        ]
    return [
        f"the KV blocks hold {planned.num_tokens:,} tokens, less than one sequence of max_model_len"
        f" {planned.max_model_len:,}: longer ones end there"
    ]


def shape_model(
    config: Config, checkpoint: CheckpointConfig, shard: RankShard, dtype: torch.dtype
) -> nn.Module:
    """Return the model of a rank on the meta device: its parameters have shapes and no memory."""
    group = TPGroup(shard.rank, config.parallel.tensor_parallel_size)
    parts = ModelParts(checkpoint, shard, group, make_attention_backend("sdpa", 1.0), max_model_len=1)
    return build_model(parts, dtype, torch.device("meta"))
