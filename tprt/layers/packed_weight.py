"""Multiplying by a weight: in oneDNN's blocked layout on CPUs, as it lies elsewhere.

On a CPU, at 1 to 64 rows, a multiplication by a weight that was packed once is 1.5 to 4 times as fast as
`functional.linear`, and a row's result does not depend on how many rows there are. On a GPU a few rows are
multiplied by a kernel of our own, where that is faster than cuBLAS. Knows nothing of layers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tprt import kernels


def can_pack(weight: Tensor) -> bool:
    """Tell whether `weight` `[out, in]` is on a CPU where oneDNN multiplies its type, and not empty."""
    if weight.device.type != "cpu" or weight.numel() == 0:
        return False
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    # bfloat16 needs AVX-512 or AVX-NE-CONVERT; without them, packing is refused.
    has_bfloat16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return weight.dtype == torch.float32 or bool(has_bfloat16)


class PackedWeight:
    """A weight `[out, in]` that only a multiplication can read."""

    def __init__(self, weight: Tensor) -> None:
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return `x W^T + bias`: `[T, in]` to `[T, out]`."""
        num_rows = len(x)
        padding = _rounded_up(num_rows) - num_rows
        if padding:
            x = functional.pad(x, (0, 0, 0, padding))
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, bias, "none", [], "")
        return result[:num_rows]


def _rounded_up(num_rows: int) -> int:
    """Return the least of a few numbers of rows that is enough: all up to 16, then eight for each doubling.

    oneDNN keeps what it has made for a number of rows, megabytes for all layers of a model, and takes tens of
    milliseconds to make it.
    """
    step = max(1, (1 << num_rows.bit_length()) >> 4)
    return -(-num_rows // step) * step


def multiply_plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x W^T + bias` for a weight `[out, in]` that was not packed: `[T, in]` to `[T, out]`."""
    if kernels.can_use(x):
        from tprt.kernels.gemv import can_multiply, multiply_rows

        if can_multiply(x, weight):
            return multiply_rows(x, weight, bias)
    return functional.linear(x, weight, bias)
