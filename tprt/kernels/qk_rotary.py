# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""All that lies between the QKV projection and attention, in one kernel.

Queries and keys are normalised per head (where the model does that) and rotated; keys and values go into the
paged cache. Rounds where `RMSNorm` and `apply_rotary` of `tprt.layers` round.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tprt.kernels import power_of_two
from tprt.kernels.dependent_launch import await_predecessor, dependent_options
from tprt.kernels.preparation import Preparation

# So many tokens make programs enough, and several heads can share one.
_MANY_TOKENS = 64


@triton.jit
def other_half(dim, size: tl.constexpr):
    """Return what each place of a head is rotated against."""
    return tl.where(dim < size // 2, dim + size // 2, dim - size // 2)


@triton.jit
def load_row(row, dim, size: tl.constexpr):
    """Load a row `[1, padded]` of `size` numbers in float32."""
    return tl.load(row + dim, mask=dim < size, other=0.0).to(tl.float32)[None, :]


@triton.jit
def prepared(x, twin, weight, twin_weight, cos, sin, eps, size: tl.constexpr, norms: tl.constexpr):  # noqa: PLR0913
    """Normalise (if `norms`) and rotate heads `x` `[n, padded]`; `twin` are the same with halves exchanged.

    The others are rows `[1, padded]` in float32, the sines signed.
    """
    dtype = x.dtype
    if norms:
        wide = x.to(tl.float32)
        factor = tl.rsqrt(tl.sum(wide * wide, 1) / size + eps)[:, None]
        x = ((wide * factor).to(dtype).to(tl.float32) * weight).to(dtype)
        twin = ((twin.to(tl.float32) * factor).to(dtype).to(tl.float32) * twin_weight).to(dtype)
    cos, sin = cos.to(dtype).to(tl.float32), sin.to(dtype).to(tl.float32)
    return ((x.to(tl.float32) * cos).to(dtype).to(tl.float32) + twin.to(tl.float32) * sin).to(dtype)


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
    size: tl.constexpr,
    padded: tl.constexpr,
    tile: tl.constexpr,
    norms: tl.constexpr,
    writes: tl.constexpr,
    keeps_keys: tl.constexpr,
    dependent: tl.constexpr,
):
    """One program for (token, `tile` heads, all of one kind).

    Rotated keys go back into `qkv` if `keeps_keys`, and with values into the cache if `writes`, but for tokens
    of slot -1.
    """
    token = tl.program_id(0).to(tl.int64)
    first = tl.program_id(1) * tile
    head, dim = first + tl.arange(0, tile), tl.arange(0, padded)
    twin = other_half(dim, size)
    real = (dim < size)[None, :] & (head >= 0)[:, None]
    row = tl.load(positions + token).to(tl.int64) * size
    await_predecessor(dependent)
    inside = head[:, None] * size + dim[None, :]
    source = qkv + token * row_stride
    x = tl.load(source + inside, mask=real, other=0.0)
    if first < heads + kv_heads:
        weight = query_weight if first < heads else key_weight
        exchanged = tl.load(source + head[:, None] * size + twin[None, :], mask=real, other=0.0)
        # fmt: off
        x = prepared(
            x, exchanged, load_row(weight, dim, size), load_row(weight, twin, size),
            load_row(cos_table + row, dim, size), load_row(sin_table + row, dim, size), eps, size, norms,
        )
        # fmt: on
    is_key = (first >= heads) & (first < heads + kv_heads)
    if first < heads:
        tl.store(query + token * (heads * size) + inside, x, mask=real)
    else:
        if keeps_keys and is_key:
            # All of a head has been read before any of it is written.
            tl.debug_barrier()
            tl.store(source + inside, x, mask=real)
        if writes:
            slot, before = tl.load(slots + token).to(tl.int64), heads if is_key else heads + kv_heads
            at = (key_cache if is_key else value_cache) + slot * slot_stride + inside - before * size
            tl.store(at, x, mask=real & (slot >= 0))


def prepare_attention(
    qkv: Tensor,
    heads: tuple[int, int],
    how: Preparation,
    cache: tuple[Tensor, Tensor] | None,
    keep_keys: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, rotate and store what the QKV projection gave.

    Args:
        qkv: `[T, h + 2 kv, D]`, a token's heads end to end; its keys are overwritten if `keep_keys`.
        heads: `h` and `kv`.
        how: of these tokens.
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
    key_cache, value_cache, slots = (qkv, qkv, how.positions) if cache is None else (*cache[0], cache[1])
    _prepare_kernel[(tokens, (num_q + 2 * num_kv) // tile)](
        *(query, qkv, key_cache, value_cache, slots, how.positions, how.cos, how.signed_sin),
        *(*how.weights(qkv), qkv.stride(0), num_kv * size),
        heads=num_q,
        kv_heads=num_kv,
        size=size,
        padded=power_of_two(size),
        tile=tile,
        norms=how.norms is not None,
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
