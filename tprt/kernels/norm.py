# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Root-mean-square normalisation, alone or behind the addition of the residual, in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tprt.kernels import power_of_two
from tprt.kernels.dependent_launch import await_predecessor, dependent_options

MAX_SIZE = 16384
"""The largest row: one program holds all of it in registers."""


@triton.jit
def _norm_kernel(  # noqa: PLR0913
    output,
    x,
    residual,
    weight,
    eps,
    size: tl.constexpr,
    padded: tl.constexpr,
    adds: tl.constexpr,
    dependent: tl.constexpr,
):
    """One program for a row; the sum, and what the weight multiplies, are rounded to the row's type."""
    start = tl.program_id(0).to(tl.int64) * size
    column = tl.arange(0, padded)
    real = column < size
    scale = tl.load(weight + column, mask=real, other=0.0)
    await_predecessor(dependent)
    row = tl.load(x + start + column, mask=real, other=0.0)
    dtype = row.dtype
    if adds:
        before = tl.load(residual + start + column, mask=real, other=0.0)
        row = (row.to(tl.float32) + before.to(tl.float32)).to(dtype)
        tl.store(residual + start + column, row, mask=real)
    wide = row.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / size
    normed = (wide * tl.rsqrt(mean + eps)).to(dtype).to(tl.float32)
    tl.store(output + start + column, (normed * scale.to(tl.float32)).to(dtype), mask=real)


def can_normalise(x: Tensor) -> bool:
    """Tell whether the rows of `x` `[..., H]` lie end to end and are not too long."""
    return x.is_contiguous() and 0 < x.shape[-1] <= MAX_SIZE


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x` `[..., H]` normalised and weighted."""
    return _launch(x, None, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `x` to `residual`, both `[..., H]`, in place, and return the sum normalised and weighted."""
    return _launch(x, residual, weight, eps)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    output, size = torch.empty_like(x), x.shape[-1]
    padded = power_of_two(size)
    _norm_kernel[(x.numel() // size,)](
        *(output, x, x if residual is None else residual, weight, eps),
        size=size,
        padded=padded,
        adds=residual is not None,
        num_warps=min(16, max(1, padded // 256)),
        **dependent_options(x.device),
    )
    return output
