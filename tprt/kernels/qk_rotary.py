# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""All that lies between the QKV projection and attention, in one kernel.

Queries and keys are normalised per head (where the model does that) and rotated; keys and values go into the
paged cache. Rounds where `RMSNorm` and `apply_rotary` of `tprt.layers` round.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from tprt.kernels import power_of_two
from tprt.kernels.dependent_launch import await_predecessor, dependent_options

# So many tokens make programs enough, and several heads can share one.
_MANY_TOKENS = 64


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights `[D]` of the query and the key norm."""

    query: Tensor
    key: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class RotaryTables:
    """Cosines and signed sines `[P, D]` in float32, and the position `[T]` int64 of each token."""

    cos: Tensor
    signed_sin: Tensor
    positions: Tensor


@triton.jit
def _normalised(a, b, weight, eps, half: tl.constexpr, padded: tl.constexpr):
    """Normalise heads, given as their halves `a` and `b`."""
    dim = tl.arange(0, padded)
    low = tl.load(weight + dim, mask=dim < half, other=0.0).to(tl.float32)
    high = tl.load(weight + half + dim, mask=dim < half, other=0.0).to(tl.float32)
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    mean = (tl.sum(wide_a * wide_a, 1) + tl.sum(wide_b * wide_b, 1)) / (2 * half)
    factor = tl.rsqrt(mean + eps)[:, None]
    normed_a, normed_b = (wide_a * factor).to(a.dtype), (wide_b * factor).to(a.dtype)
    result_a = (normed_a.to(tl.float32) * low[None, :]).to(a.dtype)
    return result_a, (normed_b.to(tl.float32) * high[None, :]).to(a.dtype)


@triton.jit
def _rotated(a, b, cos_row, sin_row, half: tl.constexpr, padded: tl.constexpr):
    """Rotate heads, given as their halves; of the signed sines the second half is the positive one."""
    dim = tl.arange(0, padded)
    cos = tl.load(cos_row + dim, mask=dim < half, other=0.0).to(a.dtype).to(tl.float32)[None, :]
    sin = tl.load(sin_row + half + dim, mask=dim < half, other=0.0).to(a.dtype).to(tl.float32)[None, :]
    wide_a, wide_b = a.to(tl.float32), b.to(tl.float32)
    result_a = ((wide_a * cos).to(a.dtype).to(tl.float32) - wide_b * sin).to(a.dtype)
    return result_a, ((wide_b * cos).to(a.dtype).to(tl.float32) + wide_a * sin).to(a.dtype)


@triton.jit(do_not_specialize_on_alignment=["positions", "slots"])
def _prepare_kernel(  # noqa: PLR0913
    query,
    qkv,
    key_cache,
    value_cache,
    slots,
    positions,
    cos_table,
    sin_table,
    query_weight,
    key_weight,
    eps,
    row_stride,
    slot_stride,
    heads: tl.constexpr,
    kv_heads: tl.constexpr,
    half: tl.constexpr,
    padded: tl.constexpr,
    tile: tl.constexpr,
    norms: tl.constexpr,
    writes: tl.constexpr,
    keeps_keys: tl.constexpr,
    dependent: tl.constexpr,
):
    """One program for (token, `tile` heads, all of one kind); `half` is that of the head's size.

    Rotated keys go back into `qkv` if `keeps_keys`, and with values into the cache if `writes`, but for tokens
    of slot -1.
    """
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * tile
    head, dim = first + tl.arange(0, tile), tl.arange(0, padded)
    real = (dim < half)[None, :] & (head >= 0)[:, None]
    inside = head[:, None] * (2 * half) + dim[None, :]
    rotation = tl.load(positions + token).to(tl.int64) * (2 * half)
    await_predecessor(dependent)
    source = qkv + token * row_stride + inside
    a, b = tl.load(source, mask=real, other=0.0), tl.load(source + half, mask=real, other=0.0)
    if first < heads + kv_heads:
        if norms:
            weight = query_weight if first < heads else key_weight
            a, b = _normalised(a, b, weight, eps, half, padded)
        a, b = _rotated(a, b, cos_table + rotation, sin_table + rotation, half, padded)
    if first < heads:
        at = query + token * (heads * 2 * half) + inside
        tl.store(at, a, mask=real)
        tl.store(at + half, b, mask=real)
    else:
        is_key = first < heads + kv_heads
        if keeps_keys and is_key:
            tl.store(source, a, mask=real)
            tl.store(source + half, b, mask=real)
        if writes:
            slot = tl.load(slots + token).to(tl.int64)
            before = heads if is_key else heads + kv_heads
            cache = key_cache if is_key else value_cache
            at = cache + slot * slot_stride + inside - before * (2 * half)
            written = real & (slot >= 0)
            tl.store(at, a, mask=written)
            tl.store(at + half, b, mask=written)


def prepare_attention(
    qkv: Tensor,
    heads: tuple[int, int],
    rotary: RotaryTables,
    norms: HeadNorms | None,
    cache: tuple[Tensor, Tensor] | None,
    keep_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, rotate and store what the QKV projection gave.

    Args:
        qkv: `[T, h + 2 kv, D]`, a token's heads end to end; its keys are overwritten if `keep_keys`.
        heads: `h` and `kv`.
        rotary: of these tokens.
        norms: None for a model without them.
        cache: `kv_cache` `[2, N, block_size, kv, D]`, and the slot `[T]` int64 of each token, -1 for none; None
            to store nothing.
        keep_keys: the keys that are returned will be read. Without, they are not rotated.

    Returns:
        queries `[T, h, D]` of their own, and keys and values `[T, kv, D]` inside `qkv`.
    """
    (tokens, _, size), (num_q, num_kv) = qkv.shape, heads
    query = qkv.new_empty(tokens, num_q, size)
    tile = _heads_per_program(tokens, num_q, num_kv, size)
    # What a flag turns off is not looked at; any tensor serves.
    key_cache, value_cache, slots = (qkv, qkv, rotary.positions) if cache is None else (*cache[0], cache[1])
    weights = (qkv, qkv, 0.0) if norms is None else (norms.query, norms.key, norms.eps)
    _prepare_kernel[(tokens, (num_q + 2 * num_kv) // tile)](
        *(query, qkv, key_cache, value_cache, slots, rotary.positions, rotary.cos, rotary.signed_sin),
        *(*weights, qkv.stride(0), num_kv * size),
        heads=num_q,
        kv_heads=num_kv,
        half=size // 2,
        padded=power_of_two(size // 2),
        tile=tile,
        norms=norms is not None,
        writes=cache is not None,
        keeps_keys=keep_keys,
        num_warps=1,
        **dependent_options(qkv.device),
    )
    return query, qkv[:, num_q : num_q + num_kv], qkv[:, num_q + num_kv :]


def _heads_per_program(tokens: int, num_q: int, num_kv: int, size: int) -> int:
    """Return a number that divides queries and keys: the heads of a program are all of one kind."""
    if tokens < _MANY_TOKENS or size > 128:
        return 1
    return next(tile for tile in (4, 2, 1) if num_q % tile == 0 and num_kv % tile == 0)
