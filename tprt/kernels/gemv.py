# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Multiplying a few rows by a weight: reading the weight is all that takes time.

For one or two rows each program multiplies some rows of the weight in registers; beyond, tensor cores do it
with 16 rows or more, and where there are few columns several programs share the sum over the inputs (split-K).
The last of them to finish adds up their parts in a fixed order, so results are the same every time. Sums are in
float32. How the work is cut is in `gemv_tiles.py`.

On tensor cores, what a program reads of the weight first is on its way while it waits for the kernel before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tprt.kernels import power_of_two
from tprt.kernels.dependent_launch import LINE_BYTES, await_predecessor, dependent_options, prefetch
from tprt.kernels.gemv_tiles import DotTile, VectorTile, tile_for

_LEAST_PADDED_ROWS = 16
_MAX_GROUPS = 1 << 16
# By device: how many programs of each group have come; 0 between launches, which follow one another.
_arrivals: dict[torch.device, Tensor] = {}


@triton.jit
def _vector_kernel(  # noqa: PLR0913
    output,
    x,
    weight,
    bias,
    x_stride,
    columns: tl.constexpr,
    inputs: tl.constexpr,
    rows: tl.constexpr,
    has_bias: tl.constexpr,
    tile_n: tl.constexpr,
    tile_k: tl.constexpr,
    dependent: tl.constexpr,
):
    """One program for `tile_n` columns of the output `[rows, columns]`."""
    n, k = tl.program_id(0) * tile_n + tl.arange(0, tile_n), tl.arange(0, tile_k)
    at = weight + n.to(tl.int64)[:, None] * inputs + k[None, :]
    await_predecessor(dependent)
    acc_0, acc_1 = tl.zeros([tile_n, tile_k], tl.float32), tl.zeros([tile_n, tile_k], tl.float32)
    acc_2, acc_3 = tl.zeros([tile_n, tile_k], tl.float32), tl.zeros([tile_n, tile_k], tl.float32)
    for start in tl.static_range(0, inputs, tile_k):
        # What is never masked is known to the compiler, and loaded in whole vectors.
        in_k = (start + k < inputs) if start + tile_k > inputs else (k < tile_k)
        in_n = (n < columns) if columns % tile_n else (tl.arange(0, tile_n) < tile_n)
        w = tl.load(at + start, mask=in_n[:, None] & in_k[None, :], other=0.0).to(tl.float32)
        acc_0 += w * tl.load(x + start + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        if rows > 1:
            acc_1 += w * tl.load(x + x_stride + start + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        if rows > 2:
            acc_2 += w * tl.load(x + 2 * x_stride + start + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
        if rows > 3:
            acc_3 += w * tl.load(x + 3 * x_stride + start + k, mask=in_k, other=0.0).to(tl.float32)[None, :]
    _store_sum(output, acc_0, bias, 0, n, columns, has_bias)
    if rows > 1:
        _store_sum(output, acc_1, bias, 1, n, columns, has_bias)
    if rows > 2:
        _store_sum(output, acc_2, bias, 2, n, columns, has_bias)
    if rows > 3:
        _store_sum(output, acc_3, bias, 3, n, columns, has_bias)


@triton.jit
def _store_sum(output, acc, bias, row, n, columns: tl.constexpr, has_bias: tl.constexpr):  # noqa: PLR0913
    total = tl.sum(acc, 1)
    if has_bias:
        total += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)
    tl.store(output + row * columns + n, total.to(output.dtype.element_ty), mask=n < columns)


@triton.jit
def _fetch_tile(weight, n, start, columns: tl.constexpr, inputs: tl.constexpr, tile_k: tl.constexpr):
    """Bring `tile_k` numbers from `start` on of rows `n` of the weight into the L2 cache."""
    in_line: tl.constexpr = LINE_BYTES * 8 // weight.dtype.element_ty.primitive_bitwidth
    column = tl.minimum(start + tl.arange(0, triton.cdiv(tile_k, in_line)) * in_line, inputs - 1)
    row = tl.minimum(n, columns - 1).to(tl.int64)
    prefetch(weight + row[:, None] * inputs + column[None, :])


@triton.jit(do_not_specialize=["rows"])
def _dot_kernel(  # noqa: PLR0913
    output,
    parts,
    arrivals,
    x,
    weight,
    bias,
    rows,
    x_stride,
    columns: tl.constexpr,
    inputs: tl.constexpr,
    has_bias: tl.constexpr,
    padded_rows: tl.constexpr,
    tile_n: tl.constexpr,
    tile_k: tl.constexpr,
    num_splits: tl.constexpr,
    dependent: tl.constexpr,
):
    """One program for (`tile_n` columns, split): its share of the inputs, in whole tiles."""
    group, split = tl.program_id(0), tl.program_id(1)
    n, row, k = group * tile_n + tl.arange(0, tile_n), tl.arange(0, padded_rows), tl.arange(0, tile_k)
    share: tl.constexpr = (inputs + tile_k * num_splits - 1) // (tile_k * num_splits) * tile_k
    acc = tl.zeros([padded_rows, tile_n], tl.float32)
    at_x, at_w = x + row[:, None] * x_stride, weight + n.to(tl.int64)[None, :] * inputs
    if dependent:
        _fetch_tile(weight, n, split * share, columns, inputs, tile_k)
    await_predecessor(dependent)
    for step in range(0, share, tile_k):
        column = split * share + step + k
        real = column < inputs
        a = tl.load(at_x + column[None, :], mask=(row < rows)[:, None] & real[None, :], other=0.0)
        b = tl.load(at_w + column[:, None], mask=(n < columns)[None, :] & real[:, None], other=0.0)
        acc = tl.dot(a, b, acc)
    inside = row[:, None] * columns + n[None, :]
    real = (row < rows)[:, None] & (n < columns)[None, :]
    last = True
    if num_splits > 1:
        tl.store(parts + split * rows * columns + inside, acc, mask=real)
        # All threads have stored before this program counts as having come.
        tl.debug_barrier()
        last = tl.atomic_add(arrivals + group, 1, sem="acq_rel") == num_splits - 1
        if last:
            tl.store(arrivals + group, 0)
            acc = tl.zeros([padded_rows, tile_n], tl.float32)
            for other in range(num_splits):
                acc += tl.load(
                    parts + other * rows * columns + inside, mask=real, other=0.0, cache_modifier=".cg"
                )
    if last:
        if has_bias:
            acc += tl.load(bias + n, mask=n < columns, other=0.0).to(tl.float32)[None, :]
        tl.store(output + inside, acc.to(output.dtype.element_ty), mask=real)


def can_multiply(x: Tensor, weight: Tensor) -> bool:
    """Tell whether `multiply_rows` takes `x` `[T, in]` and `weight` `[out, in]`, and is faster than cuBLAS."""
    return (
        x.dim() == 2
        and x.element_size() == 2
        and x.dtype == weight.dtype
        and x.stride(1) == 1
        and weight.is_contiguous()
        and tile_for(len(x), *weight.shape) is not None
    )


def multiply_rows(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x W^T + bias`, `[T, in]` to `[T, out]`, for a few rows; ask `can_multiply` before."""
    tile = tile_for(len(x), *weight.shape)
    assert tile is not None, "cuBLAS is faster"
    return multiply_with(tile, x, weight, bias)


def multiply_with(tile: VectorTile | DotTile, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Multiply with the work cut as `tile` says."""
    (rows, inputs), columns = x.shape, weight.shape[0]
    output = x.new_empty(rows, columns)
    groups = triton.cdiv(columns, tile.columns)
    shapes = {"columns": columns, "inputs": inputs, "has_bias": bias is not None}
    given = output if bias is None else bias
    if isinstance(tile, VectorTile):
        _vector_kernel[(groups,)](
            *(output, x, weight, given, x.stride(0)),
            **shapes,
            rows=rows,
            tile_n=tile.columns,
            tile_k=tile.inputs,
            num_warps=tile.num_warps,
            **dependent_options(x.device),
        )
        return output
    split = tile.splits > 1
    parts = torch.empty(tile.splits, rows, columns, dtype=torch.float32, device=x.device) if split else output
    _dot_kernel[(groups, tile.splits)](
        *(output, parts, _arrivals_on(x.device, groups) if split else output, x, weight, given),
        *(rows, x.stride(0)),
        **shapes,
        padded_rows=max(_LEAST_PADDED_ROWS, power_of_two(rows)),
        tile_n=tile.columns,
        tile_k=tile.inputs,
        num_splits=tile.splits,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **dependent_options(x.device),
    )
    return output


def _arrivals_on(device: torch.device, groups: int) -> Tensor:
    """Return the counters of a device, which stay where they are: captured graphs hold their address."""
    assert groups <= _MAX_GROUPS, f"{groups} groups of columns are split; {_MAX_GROUPS} at most"
    if device not in _arrivals:
        _arrivals[device] = torch.zeros(_MAX_GROUPS, dtype=torch.int32, device=device)
    return _arrivals[device]
