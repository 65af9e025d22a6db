# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""One or two rows times `[gate | up]`, and `silu(gate) * up` of that, in one kernel.

The products are rounded as they would be if they were stored between.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tprt.kernels.dependent_launch import await_predecessor, dependent_options
from tprt.kernels.gemv import can_multiply
from tprt.kernels.gemv_tiles import VectorTile, tile_for

_MOST_ROWS = 2


@triton.jit
def _gated_kernel(  # noqa: PLR0913
    output,
    x,
    weight,
    x_stride,
    columns: tl.constexpr,
    inputs: tl.constexpr,
    rows: tl.constexpr,
    tile_n: tl.constexpr,
    tile_k: tl.constexpr,
    dependent: tl.constexpr,
):
    """One program for `tile_n` columns of the output `[rows, columns]`: as many rows of both weights."""
    n, k = tl.program_id(0) * tile_n + tl.arange(0, tile_n), tl.arange(0, tile_k)
    at = weight + n.to(tl.int64)[:, None] * inputs + k[None, :]
    await_predecessor(dependent)
    gates_0, ups_0 = tl.zeros([tile_n, tile_k], tl.float32), tl.zeros([tile_n, tile_k], tl.float32)
    gates_1, ups_1 = tl.zeros([tile_n, tile_k], tl.float32), tl.zeros([tile_n, tile_k], tl.float32)
    for start in tl.static_range(0, inputs, tile_k):
        # What is never masked is known to the compiler, and loaded in whole vectors.
        in_k = (start + k < inputs) if start + tile_k > inputs else (k < tile_k)
        in_n = (n < columns) if columns % tile_n else (tl.arange(0, tile_n) < tile_n)
        real = in_n[:, None] & in_k[None, :]
        gate = tl.load(at + start, mask=real, other=0.0).to(tl.float32)
        up = tl.load(at + start + columns * inputs, mask=real, other=0.0).to(tl.float32)
        row = tl.load(x + start + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        gates_0 += gate * row
        ups_0 += up * row
        if rows > 1:
            row = tl.load(x + x_stride + start + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
            gates_1 += gate * row
            ups_1 += up * row
    _store_gated(output, gates_0, ups_0, n, columns)
    if rows > 1:
        _store_gated(output + columns, gates_1, ups_1, n, columns)


@triton.jit
def _store_gated(output, gates, ups, n, columns: tl.constexpr):
    dtype = output.dtype.element_ty
    gate = tl.sum(gates, 1).to(dtype).to(tl.float32)
    up = tl.sum(ups, 1).to(dtype).to(tl.float32)
    activated = (gate / (1.0 + tl.exp(-gate))).to(dtype).to(tl.float32)
    tl.store(output + n, (activated * up).to(dtype), mask=n < columns)


def can_multiply_gated(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `multiply_gated` takes `x` `[T, in]` and `weight` `[2 i, in]`."""
    return len(x) <= _MOST_ROWS and can_multiply(x, weight)


def multiply_gated(x: Tensor, weight: Tensor) -> Tensor:
    """Return `silu(x gate^T) * (x up^T)`, `[T, i]`, for `weight` `[gate | up]` `[2 i, in]`."""
    (rows, inputs), columns = x.shape, weight.shape[0] // 2
    tile = tile_for(rows, *weight.shape)
    assert isinstance(tile, VectorTile), "so few rows are multiplied in registers"
    # A program reads as many rows of the weight as in a plain product.
    tile_n = max(1, tile.columns // 2)
    output = x.new_empty(rows, columns)
    _gated_kernel[(triton.cdiv(columns, tile_n),)](
        *(output, x, weight, x.stride(0)),
        columns=columns,
        inputs=inputs,
        rows=rows,
        tile_n=tile_n,
        tile_k=tile.inputs,
        num_warps=tile.num_warps,
        **dependent_options(x.device),
    )
    return output
