"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from tprt import kernels
from tprt.layers.parameter import whole


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = whole(size)
        self._shape = (size,)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[..., H]`."""
        if self._has_kernel_for(x):
            from tprt.kernels.norm import rms_norm

            return rms_norm(x, self.weight, self.eps)
        if x.dtype == self.weight.dtype and x.element_size() == 4:
            return functional.rms_norm(x, self._shape, self.weight, self.eps)
        normed = functional.rms_norm(x.float(), self._shape, None, self.eps)
        return self.weight * normed.to(x.dtype)

    def add_forward(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised `x + residual`, and that sum as the next residual (written in place).

        `x` is None before the first layer: there is nothing to add.
        """
        if x is None:
            return self.forward(residual), residual
        if self._has_kernel_for(x) and self._has_kernel_for(residual):
            from tprt.kernels.norm import add_rms_norm

            return add_rms_norm(x, residual, self.weight, self.eps), residual
        residual = residual.add_(x)
        return self.forward(residual), residual

    def _has_kernel_for(self, x: Tensor) -> bool:
        if not kernels.can_use(x) or x.dtype != self.weight.dtype:
            return False
        from tprt.kernels.norm import can_normalise

        return can_normalise(x)
