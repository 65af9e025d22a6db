"""The KV blocks of one rank: how many fit, and their memory.

Knows nothing of which sequence owns which block.
"""

from __future__ import annotations

import torch
from torch import nn

from tprt.checkpoint_config import CheckpointConfig
from tprt.config import CacheConfig
from tprt.errors import ConfigError
from tprt.layers.attention import Attention
from tprt.sharding import RankShard


def kv_block_bytes(checkpoint: CheckpointConfig, shard: RankShard, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one KV block over all layers of this rank."""
    per_token = 2 * shard.kv_heads.size * checkpoint.head_dim * dtype.itemsize
    return checkpoint.num_hidden_layers * block_size * per_token


def num_blocks_that_fit(cache: CacheConfig, block_bytes: int, device: torch.device) -> int:
    """Return how many blocks the settings and the free memory allow on this rank.

    Raises:
        ConfigError: not even one block fits; says how much memory there is and what to change.
    """
    if cache.num_blocks is not None:
        return cache.num_blocks
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        budget = int(free - (1 - cache.memory_fraction) * total)
        advice = f"cache.memory_fraction {cache.memory_fraction} of {total} bytes leaves {budget} after weights"
    else:
        budget = int(cache.cpu_memory_gib * 2**30)
        advice = f"cache.cpu_memory_gib {cache.cpu_memory_gib} is {budget} bytes"
    if budget < block_bytes:
        raise ConfigError(
            f"no KV block fits: one takes {block_bytes} bytes and {advice}; raise that setting, use more"
            " ranks or a smaller model"
        )
    return budget // block_bytes


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
