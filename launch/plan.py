"""What each rank of a deployment will hold, found without loading anything.

The model of every rank is built on torch's meta device, which has shapes and no memory, so weight bytes are
those that a start allocates, whatever the architecture. Knows nothing of how the result is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprt.attention import make_attention_backend
from tprt.checkpoint_config import CheckpointConfig, read_checkpoint_config, resolve_max_model_len
from tprt.config import Config
from tprt.distributed import TPGroup
from tprt.models import ModelParts, build_model
from tprt.sharding import RankShard, legal_world_sizes, make_shard_plan, shape_of
from tprt.worker.kv_cache import kv_block_bytes, num_blocks_that_fit
from tprt.worker.model_runner import resolve_dtype


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank's part: heads, channels and rows, and bytes.

    `num_blocks` is what fits beside the weights into this rank's memory, None where that is not known.
    """

    shard: RankShard
    weight_bytes: int
    kv_bytes_per_token: int
    num_blocks: int | None


@dataclass(frozen=True, slots=True)
class DeploymentPlan:
    """All ranks, and what they have in common.

    `num_blocks` is the least of all ranks; the sequences of `max_model_len` tokens that it holds are
    `max_full_sequences`. `imbalance` is the heaviest rank's weight bytes over the mean.
    """

    ranks: tuple[RankPlan, ...]
    dtype: str
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
    def max_full_sequences(self) -> int | None:
        """Sequences of `max_model_len` tokens that fit at a time."""
        if self.num_blocks is None:
            return None
        return self.num_blocks // -(-self.max_model_len // self.block_size)


def plan_deployment(config: Config, memory_bytes: int | None = None) -> DeploymentPlan:
    """Plan the deployment of `config` on devices with `memory_bytes` each (None: not known).

    A number of KV blocks that is set, and the memory of CPU ranks, come from `config`.

    Raises:
        CheckpointError, ConfigError, ShardPlanError, UnsupportedModelError: it cannot be deployed.
    """
    checkpoint = read_checkpoint_config(config.model.path)
    shape = shape_of(checkpoint)
    parallel = config.parallel
    plan = make_shard_plan(shape, parallel.tensor_parallel_size, parallel.rank_weights)
    device = _device(config)
    legal = legal_world_sizes(shape)
    return DeploymentPlan(
        ranks=tuple(_plan_rank(config, checkpoint, shard, device, memory_bytes) for shard in plan.shards),
        dtype=str(resolve_dtype(config, checkpoint, device)).removeprefix("torch."),
        block_size=config.cache.block_size,
        max_model_len=resolve_max_model_len(checkpoint, config.model.max_model_len),
        legal_world_sizes=(legal[0], legal[-1]),
    )


def _device(config: Config) -> torch.device:
    """Return the type of device that is planned for, whether or not this machine has one."""
    setting = config.runtime.device
    if setting == "auto":
        setting = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(setting)


def _plan_rank(
    config: Config,
    checkpoint: CheckpointConfig,
    shard: RankShard,
    device: torch.device,
    memory_bytes: int | None,
) -> RankPlan:
    dtype = resolve_dtype(config, checkpoint, device)
    weight_bytes = _weight_bytes(config, checkpoint, shard, dtype)
    block_bytes = kv_block_bytes(checkpoint, shard, config.cache.block_size, dtype)
    return RankPlan(
        shard=shard,
        weight_bytes=weight_bytes,
        kv_bytes_per_token=block_bytes // config.cache.block_size,
        num_blocks=_num_blocks(config, device, weight_bytes, block_bytes, memory_bytes),
    )


def _weight_bytes(config: Config, checkpoint: CheckpointConfig, shard: RankShard, dtype: torch.dtype) -> int:
    group = TPGroup(shard.rank, config.parallel.tensor_parallel_size)
    parts = ModelParts(checkpoint, shard, group, make_attention_backend("auto", 1.0), max_model_len=1)
    model = build_model(parts, dtype, torch.device("meta"))
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _num_blocks(
    config: Config, device: torch.device, weight_bytes: int, block_bytes: int, memory_bytes: int | None
) -> int | None:
    if config.cache.num_blocks is not None or device.type == "cpu":
        return num_blocks_that_fit(config.cache, block_bytes, device)
    if memory_bytes is None:
        return None
    return max(0, int(memory_bytes * config.cache.memory_fraction) - weight_bytes) // block_bytes
