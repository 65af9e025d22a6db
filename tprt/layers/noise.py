"""Counter-based noise: a function of a key and a token id, with no state.

The mixing is the finaliser of MurmurHash3 (Appleby, public domain), twice, in 32 bits held by int64. CPUs and
GPUs give the same bits, integers and noise alike. Knows nothing of sampling.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from tprt.kernels.logarithm import COEFFICIENTS, LOG_TWO, SQRT_HALF_BITS
from tprt.messages import Int32Array, Int64Array

_MASK32 = 0xFFFFFFFF
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_ROUNDS = (
    (np.uint64(30), np.uint64(0xBF58476D1CE4E5B9)),
    (np.uint64(27), np.uint64(0x94D049BB133111EB)),
)
_LAST_SHIFT, _ONE = np.uint64(31), np.uint64(1)


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
    ids = torch.arange(first_id, first_id + count, device=keys.device)
    if keys.device.type != "cpu" or len(keys) == 1:
        return _noise(keys, ids)
    # Row by row: what a row takes stays in the CPU's cache, which is several times as fast.
    noise = torch.empty(len(keys), count, dtype=torch.float32, device=keys.device)
    for row, key in zip(noise, keys.unsqueeze(1), strict=True):
        row.copy_(_noise(key, ids)[0])
    return noise


def _noise(keys: Tensor, ids: Tensor) -> Tensor:
    low, high = (keys & _MASK32).unsqueeze(1), (keys >> 32).unsqueeze(1)
    bits = _mix(_mix(ids.unsqueeze(0) ^ low) ^ high)
    # 23 bits and a half: exact in float32, and neither 0 nor 1.
    uniform = (bits >> 9).float().add_(0.5).mul_(2.0**-23)
    return _log(_log(uniform).neg_()).neg_()


def _log(x: Tensor) -> Tensor:
    """Return the natural logarithm of positive numbers, within 3e-7 of it.

    By additions and multiplications, each rounded: the logarithms of CPUs and GPUs, and of the vectorised and
    the scalar loops of one CPU, differ in the last bit, and a token's noise must not depend on where it is
    computed. `tprt/kernels/sampling.py` takes the same steps in the same order.
    """
    bits = x.view(torch.int32)
    exponent = (bits - SQRT_HALF_BITS).bitwise_right_shift_(23)
    fraction = bits.sub(exponent, alpha=1 << 23).view(torch.float32).sub_(1.0)
    sum_ = fraction * COEFFICIENTS[0]
    for coefficient in COEFFICIENTS[1:]:
        sum_.add_(coefficient).mul_(fraction)
    return sum_.add_(exponent.float().mul_(LOG_TWO))


def _mix(x: Tensor) -> Tensor:
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK32
    return x ^ (x >> 16)
