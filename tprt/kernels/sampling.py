# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Choosing tokens from logits as the model left them: no copy in float32, no noise in memory, no waiting.

First, parts of a row each find their best token, greedy or with Gumbel noise made on the spot; then the best
part of a row wins. Noise has the bits of `tprt.layers.noise`, and scores those of the sampler in plain torch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tprt.kernels import power_of_two
from tprt.kernels.dependent_launch import await_predecessor, dependent_options
from tprt.kernels.logarithm import COEFFICIENTS, LOG_TWO, SQRT_HALF_BITS
from tprt.kernels.truncation import level_bits, levels_of

_TILE = 4096
_COEFFICIENTS = tl.constexpr(COEFFICIENTS)
_LOG_TWO = tl.constexpr(LOG_TWO)
_SQRT_HALF_BITS = tl.constexpr(SQRT_HALF_BITS)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _log(x):
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    fraction = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    total = fraction * _COEFFICIENTS[0]
    for power in tl.static_range(1, 8):
        total = (total + _COEFFICIENTS[power]) * fraction
    return total + exponent.to(tl.float32) * _LOG_TWO


@triton.jit
def gumbel(key, ids):
    """Return the noise of token `ids` (int32) under the int64 `key`; to be compiled without fused additions."""
    low, high = (key & 0xFFFFFFFF).to(tl.uint32), (key >> 32).to(tl.uint32)
    bits = _mix(_mix(ids.to(tl.uint32, bitcast=True) ^ low) ^ high)
    uniform = ((bits >> 9).to(tl.int32, bitcast=True).to(tl.float32) + 0.5) * 1.1920928955078125e-07
    return -_log(-_log(uniform))


@triton.jit(do_not_specialize=["first_id"], do_not_specialize_on_alignment=["temperatures", "keys"])
def _score_kernel(  # noqa: PLR0913
    best_scores,
    best_columns,
    logits,
    temperatures,
    keys,
    floors,
    first_id,
    row_stride,
    size,
    bits: tl.constexpr,
    random: tl.constexpr,
    cuts: tl.constexpr,
    tile: tl.constexpr,
    dependent: tl.constexpr,
):
    """One program for (row, part): the highest score, and the lowest column that has it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = part * tile + tl.arange(0, tile)
    await_predecessor(dependent)
    scores = tl.load(logits + row * row_stride + column, mask=column < size, other=float("-inf")).to(tl.float32)
    if random:
        temperature = tl.load(temperatures + row)
        if temperature > 0.0:
            kept = column < size
            if cuts:
                kept = kept & (levels_of(scores, bits).to(tl.int64) >= tl.load(floors + row))
            noise = gumbel(tl.load(keys + row), first_id + column)
            scores = tl.where(kept, scores * tl.div_rn(1.0, temperature) + noise, float("-inf"))
    best = tl.max(scores, 0)
    at = row * tl.num_programs(1) + part
    tl.store(best_scores + at, best)
    tl.store(best_columns + at, tl.min(tl.where(scores == best, column, 0x7FFFFFFF), 0))


@triton.jit
def _reduce_kernel(  # noqa: PLR0913
    output,
    scores,
    columns,
    first_id,
    size,
    num_parts,
    padded: tl.constexpr,
    as_candidates: tl.constexpr,
    dependent: tl.constexpr,
):
    """One program for a row: the best of its parts."""
    row, part = tl.program_id(0).to(tl.int64), tl.arange(0, padded)
    at, real = row * num_parts + part, part < num_parts
    await_predecessor(dependent)
    score = tl.load(scores + at, mask=real, other=float("-inf"))
    column = tl.load(columns + at, mask=real, other=0x7FFFFFFF)
    best = tl.max(score, 0)
    # A row of NaN has no best column; its token must be one nevertheless.
    winner = tl.minimum(tl.min(tl.where(score == best, column, 0x7FFFFFFF), 0), size - 1) + first_id
    if as_candidates:
        tl.store(output + row * 2, best.to(tl.float64))
        tl.store(output + row * 2 + 1, winner.to(tl.float64))
    else:
        tl.store(output + row, winner.to(tl.int64))


def sample_tokens(
    logits: Tensor,
    first_id: int,
    draw: tuple[Tensor, Tensor] | None,
    floors: Tensor | None,
    as_candidates: bool,
) -> Tensor:
    """Choose a token for each row of `logits` `[n, v]`, which are those of tokens `first_id ...`.

    Args:
        logits: a row's end to end.
        first_id: the first column's token.
        draw: temperatures `[n]` float32, 0 for greedy rows, and noise keys `[n]` int64; None: all are greedy.
        floors: from `truncation_floors`, None to keep all tokens.
        as_candidates: return scores too.

    Returns:
        `[n]` int64 tokens; as candidates `[n, 2]` float64, scores and tokens. The lowest token wins a tie.
    """
    (rows, size), device = logits.shape, logits.device
    parts = triton.cdiv(size, _TILE)
    scores = torch.empty(rows, parts, dtype=torch.float32, device=device)
    columns = torch.empty(rows, parts, dtype=torch.int32, device=device)
    temperatures, keys = (scores, columns) if draw is None else draw
    _score_kernel[(rows, parts)](
        *(scores, columns, logits, temperatures, keys, columns if floors is None else floors),
        *(first_id, logits.stride(0), size),
        bits=level_bits(logits.dtype),
        random=draw is not None,
        cuts=floors is not None,
        tile=_TILE,
        num_warps=4,
        # A fused multiplication and addition rounds once where the CPU rounds twice.
        enable_fp_fusion=False,
        **dependent_options(device),
    )
    shape, dtype = ((rows, 2), torch.float64) if as_candidates else ((rows,), torch.int64)
    output = torch.empty(shape, dtype=dtype, device=device)
    _reduce_kernel[(rows,)](
        *(output, scores, columns, first_id, size, parts),
        padded=power_of_two(parts),
        as_candidates=as_candidates,
        num_warps=min(8, max(1, power_of_two(parts) // 128)),
        **dependent_options(device),
    )
    return output
