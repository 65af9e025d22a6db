"""Counter-based noise: a function of a key and a token id, with no state.

The mixing is the finaliser of MurmurHash3 (Appleby, public domain), twice, in 32 bits held by int64, so that
CPUs and GPUs give the same integers. Knows nothing of sampling.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tprt.messages import Int32Array, Int64Array

_MASK32 = 0xFFFFFFFF
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_LAST_SHIFT, _ONE = np.uint64(31), np.uint64(1)
_TWO_POW_MINUS_24 = 2.0**-24


def noise_keys(seeds: Int64Array, positions: Int32Array) -> Int64Array:
    """Mix each request's seed and the position of the token to draw into 63 bits, `[n]`.

    The mixing is splitmix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators").
    """
    x = seeds.view(np.uint64) * _GOLDEN
    x += positions.astype(np.uint64)
    for shift, factor in _ROUNDS:
        x ^= x >> shift
        x *= factor
    x ^= x >> _LAST_SHIFT
    x >>= _ONE
    return x.view(np.int64)


def gumbel_noise(keys: Tensor, first_id: int, count: int) -> Tensor:
    """Draw Gumbel(0, 1) noise for token ids `first_id ... first_id + count - 1`.

    Args:
        keys: `[n]` int64 from `noise_keys`.
        first_id: first token id.
        count: number of token ids.

    Returns:
        `[n, count]` float32; an entry depends on its key and its token id only.
    """
    ids = torch.arange(first_id, first_id + count, device=keys.device).unsqueeze(0)
    low, high = (keys & _MASK32).unsqueeze(1), (keys >> 32).unsqueeze(1)
    bits = _mix(_mix(ids ^ low) ^ high)
    uniform = ((bits >> 8).double() + 0.5) * _TWO_POW_MINUS_24
    # In float64, and rounded to float32 at the end: vectorised loops and their scalar tails may differ in the
    # last bit, and the noise of a token must not depend on where its shard begins.
    return uniform.log_().neg_().log_().neg_().float()


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK32
    return x ^ (x >> 16)
