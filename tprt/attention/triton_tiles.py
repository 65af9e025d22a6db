"""How the Triton kernels are cut: tile sizes, warps, pipeline stages and the number of splits.

Follows from shapes and the device alone, never from data, so that a captured CUDA graph holds what an eager
launch would run. Knows nothing of Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tprt.kernels import power_of_two

_MAX_SPLITS = 32
_PROGRAMS_PER_PROCESSOR = 4
# With fewer sequences the product before ends too soon after its last program has begun.
_LEAST_PREPARED = 4
# Compute capabilities whose processors have 160 KiB of shared memory or more.
_LARGE_SHARED_MEMORY = ((8, 0), (9, 0), (10, 0), (10, 3))


@dataclass(frozen=True, slots=True)
class Traits:
    """What tiles depend on: the device's number of processors, and what each of them has."""

    processors: int
    large_shared_memory: bool
    tensor_cores: bool
    """As far as Triton uses them for 16-bit types."""

    @classmethod
    def of(cls, device: torch.device) -> Traits:
        """Return the traits of `device`; those of an H100 for Triton's interpreter on a CPU."""
        if device.type != "cuda":
            return cls(132, True, True)
        found = torch.cuda.get_device_properties(device)
        capability = found.major, found.minor
        return cls(found.multi_processor_count, capability in _LARGE_SHARED_MEMORY, capability >= (8, 0))


@dataclass(frozen=True, slots=True)
class Tile:
    """The shape of one program: `rows` queries against `tokens` keys at a time."""

    rows: int
    tokens: int
    num_warps: int
    num_stages: int


def padded(size: int) -> int:
    """Return the power of two that holds `size`, and 16 at least: the least side of a matrix product."""
    return max(16, power_of_two(size))


def num_splits(batch_size: int, kv_heads: int, processors: int) -> int:
    """Return into how many splits each sequence's tokens go, a power of two.

    Enough for a few programs on each of the device's `processors`. The batch size counts as the next power of
    two, here and in `prepares_heads`, so that a batch padded up to there is cut as it would be unpadded.
    """
    wanted = processors * _PROGRAMS_PER_PROCESSOR // (power_of_two(batch_size) * kv_heads)
    return min(_MAX_SPLITS, 1 << max(0, wanted.bit_length() - 1))


def prepares_heads(batch_size: int, kv_heads: int, processors: int) -> bool:
    """Tell whether a decode prepares its heads itself.

    That pays where all programs run at once: those that come later would make it longer.
    """
    size = power_of_two(batch_size)
    return size >= _LEAST_PREPARED and size * kv_heads <= processors * _PROGRAMS_PER_PROCESSOR


def decode_tile(group: int, head_dim: int, itemsize: int, traits: Traits, prepares: bool) -> Tile:
    """Return the tile of a decode with `group` query heads for each KV head, which it `prepares` or not."""
    size, rows = padded(head_dim), padded(group)
    if itemsize > 2 or not traits.tensor_cores:
        return Tile(rows, 16, _vector_warps(size), 2)
    return Tile(rows, min(32, 8192 // size), 2 if prepares else 4, 3)


def prefill_tile(max_seqlen_q: int, head_dim: int, itemsize: int, traits: Traits) -> Tile:
    """Return the tile of a prefill whose longest chunk has `max_seqlen_q` tokens."""
    size = padded(head_dim)
    if itemsize > 2 or not traits.tensor_cores:
        return Tile(16, 16, _vector_warps(size), 2)
    if not traits.large_shared_memory or size > 128:
        return Tile(64, 32, 4, 2)
    if max_seqlen_q <= 64:
        return Tile(64, 64, 4, 2)
    return Tile(128, 64, 8, 3)


def _vector_warps(size: int) -> int:
    """Without tensor cores everything is multiplied in registers: more warps where rows are long."""
    return 4 if size <= 128 else 8
