"""The KV blocks of one rank: their size, how many fit into a budget, and their memory.

Knows nothing of which sequence owns which block, and of how the budget was found.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from tprt.checkpoint_config import CheckpointConfig
from tprt.config import CacheConfig
from tprt.errors import ConfigError
from tprt.layers.attention import Attention
from tprt.log import get_logger
from tprt.sharding import RankShard
from tprt.worker.memory_budget import MemoryBudget, gib

_LOG = get_logger(__name__)
# What is asked for after the memory for KV blocks has run out, as a share of what was asked for before.
_FEWER = 0.95


def kv_block_bytes(checkpoint: CheckpointConfig, shard: RankShard, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one KV block over all layers of this rank."""
    per_token = 2 * shard.kv_heads.size * checkpoint.head_dim * dtype.itemsize
    return checkpoint.num_hidden_layers * block_size * per_token


def cpu_budget(cache: CacheConfig) -> MemoryBudget:
    """Return the budget of a CPU rank: `cache.cpu_memory_gib` is for KV blocks alone."""
    size = int(cache.cpu_memory_gib * 2**30)
    return MemoryBudget(total=size, limit=size)


def num_blocks_that_fit(
    budget: MemoryBudget, block_bytes: int, cache: CacheConfig, max_model_len: int, is_cpu: bool
) -> int:
    """Return how many KV blocks fit into what the budget leaves.

    Raises:
        ConfigError: not even one; says where the memory went, what is needed and what to change.
    """
    num_blocks = budget.num_blocks(block_bytes)
    if num_blocks:
        return num_blocks
    full = -(-max_model_len // cache.block_size)
    raise ConfigError(
        f"no KV block fits: one takes {gib(block_bytes)}, {_leaves(budget, cache, is_cpu)};"
        f" a sequence of max_model_len {max_model_len} needs {full} blocks, {gib(full * block_bytes)}."
        f" {'Raise cache.cpu_memory_gib' if is_cpu else _CUDA_ADVICE}, use more ranks or a smaller model"
    )


_CUDA_ADVICE = (
    "Raise cache.memory_fraction, end what else uses the device, lower scheduler.max_num_batched_tokens or"
    " scheduler.max_num_seqs (they make the workspace)"
)


def require_host_memory(num_blocks: int, block_bytes: int, num_ranks: int, there: int) -> None:
    """Check that `num_blocks` KV blocks on each of `num_ranks` ranks fit into the bytes that are `there`.

    The kernel would give out more, and kill what it likes once it is used.

    Raises:
        ConfigError: they do not.
    """
    needed = num_blocks * block_bytes
    if needed * num_ranks > there:
        raise ConfigError(
            f"{num_blocks} KV blocks take {gib(needed)} on each of {num_ranks} ranks of this host, which has"
            f" {gib(there)} of free memory; lower cache.num_blocks or cache.cpu_memory_gib, or use a smaller"
            " model"
        )


def _leaves(budget: MemoryBudget, cache: CacheConfig, is_cpu: bool) -> str:
    if is_cpu:
        return f"and cache.cpu_memory_gib {cache.cpu_memory_gib} is {gib(budget.total)}"
    graphs = f", CUDA graphs {gib(budget.graphs)}" if budget.graphs else ""
    return (
        f"and of {gib(budget.total)} cache.memory_fraction {cache.memory_fraction} allows {gib(budget.limit)},"
        f" of which others use {gib(budget.others)}, weights {gib(budget.weights)}, workspace"
        f" {gib(budget.workspace)}{graphs}: {gib(budget.available)} are left"
    )


def allocate_kv_cache(model: nn.Module, num_blocks: int, block_size: int) -> int:
    """Give every attention layer of `model` its KV blocks, zeroed; return their bytes.

    Zeroed, because padding that is gathered with a weight of 0 must not be NaN.
    """
    num_bytes = 0
    for layer in model.modules():
        if isinstance(layer, Attention):
            shape = (2, num_blocks, block_size, layer.num_kv_heads, layer.head_dim)
            reference = next(model.parameters())
            layer.kv_cache = torch.zeros(shape, dtype=reference.dtype, device=reference.device)
            num_bytes += layer.kv_cache.numel() * layer.kv_cache.element_size()
    return num_bytes


def release_kv_cache(model: nn.Module) -> None:
    """Take the KV blocks of every attention layer of `model` away."""
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.kv_cache = torch.empty(0)


def allocate_on_all_ranks(
    allocate: Callable[[int], int], release: Callable[[], None], least_of: Callable[[int], int], num_blocks: int
) -> tuple[int, int]:
    """Allocate `num_blocks` KV blocks, or the most that the poorest rank can really get.

    Every rank must call it with the same number.

    Args:
        allocate: allocates a number of blocks and returns their bytes.
        release: gives back what `allocate` got, all or a part of it.
        least_of: the least of all ranks' values.
        num_blocks: what fits by the budget.

    Returns:
        The number of blocks, the same on every rank, and this rank's bytes.
    """
    gotten, num_bytes = _allocate_or_fewer(allocate, release, num_blocks)
    agreed = least_of(gotten)
    if gotten > agreed:
        release()
        num_bytes = allocate(agreed)
    return agreed, num_bytes


def _allocate_or_fewer(
    allocate: Callable[[int], int], release: Callable[[], None], num_blocks: int
) -> tuple[int, int]:
    while True:
        try:
            return num_blocks, allocate(num_blocks)
        except RuntimeError as error:
            if num_blocks == 1 or not _is_out_of_memory(error):
                raise
        # outside of the handler: the error holds on to tensors of the failed attempt
        release()
        fewer = max(1, int(num_blocks * _FEWER))
        _LOG.warning("the memory for %d KV blocks is not there; trying %d", num_blocks, fewer)
        num_blocks = fewer


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Say whether a device, or torch's allocator for CPUs, has run out of memory."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
