# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Looking up tokens among some rows of an embedding, zeros for the others, in one kernel."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from tprt.kernels.dependent_launch import await_predecessor, dependent_options

_TILE = 1024


@triton.jit(do_not_specialize=["first"], do_not_specialize_on_alignment=["token_ids"])
def _look_up_kernel(  # noqa: PLR0913
    output, token_ids, weight, first, num_rows, size, tile: tl.constexpr, dependent: tl.constexpr
):
    """One program for (token, tile)."""
    await_predecessor(dependent)
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * tile + tl.arange(0, tile)
    row = tl.load(token_ids + token).to(tl.int64) - first
    here = (row >= 0) & (row < num_rows)
    found = tl.load(weight + row * size + column, mask=here & (column < size), other=0.0)
    tl.store(output + token * size + column, found, mask=column < size)


def look_up_own(token_ids: Tensor, weight: Tensor, first: int) -> Tensor:
    """Return `[T, H]`: row `token_ids[t] - first` of `weight` `[rows, H]`, or zeros where there is none."""
    (num_rows, size), tokens = weight.shape, len(token_ids)
    output = weight.new_empty(tokens, size)
    grid = (tokens, triton.cdiv(size, _TILE))
    _look_up_kernel[grid](
        *(output, token_ids, weight, first, num_rows, size),
        tile=_TILE,
        num_warps=4,
        **dependent_options(weight.device),
    )
    return output
