# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""`silu(gate) * up` of a merged projection, in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tprt.kernels.dependent_launch import await_predecessor, dependent_options

_TILE = 1024


@triton.jit
def _silu_and_mul_kernel(output, gate_up, size, tile: tl.constexpr, dependent: tl.constexpr):
    """One program for (row, tile); the activation is rounded to the row's type before it is multiplied."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    real = column < size
    await_predecessor(dependent)
    at = gate_up + row * 2 * size + column
    gate = tl.load(at, mask=real, other=0.0)
    up = tl.load(at + size, mask=real, other=0.0).to(tl.float32)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype).to(tl.float32)
    tl.store(output + row * size + column, (activated * up).to(gate.dtype), mask=real)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`gate_up` `[T, 2 i]`, rows end to end, to `[T, i]`."""
    rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(rows, size)
    _silu_and_mul_kernel[(rows, triton.cdiv(size, _TILE))](
        *(output, gate_up, size), tile=_TILE, num_warps=4, **dependent_options(gate_up.device)
    )
    return output
