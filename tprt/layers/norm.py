"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from tprt.layers.parameter import whole


class RMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in float32 inside."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = whole(size)
        self._shape = (size,)
        self._eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` `[..., H]`."""
        if x.dtype == self.weight.dtype and x.element_size() == 4:
            return functional.rms_norm(x, self._shape, self.weight, self._eps)
        normed = functional.rms_norm(x.float(), self._shape, None, self._eps)
        return self.weight * normed.to(x.dtype)

    def add_forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised `x + residual`, and that sum as the next residual (written in place)."""
        residual = residual.add_(x)
        return self.forward(residual), residual
