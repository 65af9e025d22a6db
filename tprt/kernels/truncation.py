# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Where top-k, top-p and min-p cut a row of logits, found without sorting it.

Floating-point numbers are ordered like integers made of their bits. The level of a logit is so many leading
bits of that integer that no two logits of its type share one; the search settles two bits of the cut in each
pass over the row, by counts for top-k and by probabilities for top-p.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096
_BITS = {torch.bfloat16: 16, torch.float16: 20, torch.float32: 32}


@triton.jit
def levels_of(logits, bits: tl.constexpr):
    """Return the levels (uint32) of `logits` in float32; both zeros have the same."""
    raw = (logits + 0.0).to(tl.int32, bitcast=True)
    ordered = raw ^ ((raw >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.uint32, bitcast=True) ^ 0x80000000) >> (32 - bits)


@triton.jit
def _tile_of(row, start, size, tile: tl.constexpr):
    column = start + tl.arange(0, tile)
    return tl.load(row + column, mask=column < size, other=float("-inf")).to(tl.float32)


@triton.jit
def _mass(  # noqa: PLR0913
    row, floor, peak, scale, size, bits: tl.constexpr, tile: tl.constexpr
):
    """Return the sum of exp((logit - peak) * scale) from level `floor` up."""
    sums = tl.zeros([tile], tl.float32)
    for start in range(0, size, tile):
        logits = _tile_of(row, start, size, tile)
        sums += tl.where(levels_of(logits, bits) >= floor, tl.exp((logits - peak) * scale), 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _highest_level(  # noqa: PLR0913
    row, goal, floor, peak, scale, size, counts: tl.constexpr, bits: tl.constexpr, tile: tl.constexpr
):
    """Return the highest level from which up there are `goal` tokens (`counts`) or that mass above `floor`."""
    level = (goal * 0).to(tl.uint32)
    for step in range(bits // 2):
        unit = (level * 0 + 1) << (bits - 2 - 2 * step)
        one, two, three = level + unit, level + 2 * unit, level + 3 * unit
        ones, twos = tl.zeros([tile], tl.float32), tl.zeros([tile], tl.float32)
        threes = tl.zeros([tile], tl.float32)
        for start in range(0, size, tile):
            logits = _tile_of(row, start, size, tile)
            levels = levels_of(logits, bits)
            if counts:
                weight = tl.where(start + tl.arange(0, tile) < size, 1.0, 0.0)
            else:
                weight = tl.where(levels >= floor, tl.exp((logits - peak) * scale), 0.0)
            ones += tl.where(levels >= one, weight, 0.0)
            twos += tl.where(levels >= two, weight, 0.0)
            threes += tl.where(levels >= three, weight, 0.0)
        level += tl.where(tl.sum(ones, 0) >= goal, unit, 0)
        level += tl.where(tl.sum(twos, 0) >= goal, unit, 0)
        level += tl.where(tl.sum(threes, 0) >= goal, unit, 0)
    return level


@triton.jit
def _lowest_likely(  # noqa: PLR0913
    row, least, peak, scale, size, bits: tl.constexpr, tile: tl.constexpr
):
    """Return the lowest level whose probability is `least` times the peak's or more."""
    lowest = tl.full([tile], 0xFFFFFFFF, tl.uint32)
    for start in range(0, size, tile):
        logits = _tile_of(row, start, size, tile)
        likely = tl.exp((logits - peak) * scale) >= least
        levels = levels_of(logits, bits)
        lowest = tl.where(likely & (levels < lowest), levels, lowest)
    return tl.min(lowest, 0)


@triton.jit(do_not_specialize_on_alignment=["temperatures", "top_ks", "top_ps", "min_ps"])
def _floor_kernel(  # noqa: PLR0913
    floors,
    logits,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    row_stride,
    size,
    bits: tl.constexpr,
    tile: tl.constexpr,
):
    """One program for a row: min-p and top-k each by themselves, then top-p among what they leave."""
    at = tl.program_id(0).to(tl.int64)
    row = logits + at * row_stride
    temperature = tl.load(temperatures + at)
    top_k, top_p, min_p = tl.load(top_ks + at), tl.load(top_ps + at), tl.load(min_ps + at)
    floor = (top_k * 0).to(tl.uint32)
    if (temperature > 0.0) & ((top_k > 0) | (top_p < 1.0) | (min_p > 0.0)):
        scale = tl.div_rn(1.0, temperature)
        peaks = tl.full([tile], float("-inf"), tl.float32)
        for start in range(0, size, tile):
            peaks = tl.maximum(peaks, _tile_of(row, start, size, tile))
        peak = tl.max(peaks, 0)
        if min_p > 0.0:
            floor = tl.maximum(floor, _lowest_likely(row, min_p, peak, scale, size, bits, tile))
        if (top_k > 0) & (top_k < size):
            goal = top_k.to(tl.float32)
            floor = tl.maximum(floor, _highest_level(row, goal, floor, peak, scale, size, True, bits, tile))
        if top_p < 1.0:
            goal = top_p * _mass(row, floor, peak, scale, size, bits, tile)
            floor = tl.maximum(floor, _highest_level(row, goal, floor, peak, scale, size, False, bits, tile))
        # The most likely token always stays.
        floor = tl.minimum(floor, levels_of(peak, bits))
    tl.store(floors + at, floor.to(tl.int64))


def level_bits(dtype: torch.dtype) -> int:
    """Return how many bits the levels of logits of type `dtype` have."""
    return _BITS[dtype]


def truncation_floors(
    logits: Tensor, temperatures: Tensor, top_ks: Tensor, top_ps: Tensor, min_ps: Tensor
) -> Tensor:
    """Return the least level that is kept in each row of `logits` `[n, v]`: `[n]` int64, 0 keeps all.

    The parameters are those of `SamplingBatch`, `[n]` each. Tokens as likely as the last that is kept are kept.
    """
    floors = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    _floor_kernel[(len(logits),)](
        *(floors, logits, temperatures, top_ks, top_ps, min_ps, logits.stride(0), logits.shape[1]),
        bits=level_bits(logits.dtype),
        tile=_TILE,
        num_warps=16,
    )
    return floors
