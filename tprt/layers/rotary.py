"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), halves rotated against each other.

What the layers of a step share is in `Rotation`. Knows nothing of attention.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from tprt.checkpoint_config import RopeScaling


class RotaryEmbedding(nn.Module):
    """Tables of cosines and signed sines for every position, in float32."""

    def __init__(
        self, head_dim: int, max_positions: int, theta: float, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        frequencies = inverse_frequencies(head_dim, theta, scaling)
        angles = torch.outer(torch.arange(max_positions, dtype=torch.float32, device="cpu"), frequencies)
        self._cos = torch.cat([angles.cos(), angles.cos()], dim=-1).to(torch.get_default_device())
        self._signed_sin = torch.cat([-angles.sin(), angles.sin()], dim=-1).to(torch.get_default_device())

    def forward(self, positions: Tensor) -> Rotation:
        """Return the rotation of tokens at `positions` `[T]`."""
        return Rotation(self._cos, self._signed_sin, positions)


class Rotation:
    """How the tokens of one step are rotated, in all layers alike.

    Attributes:
        cos, signed_sin: the tables `[P, D]`, in float32.
        positions: `[T]` int64.
    """

    def __init__(self, cos: Tensor, signed_sin: Tensor, positions: Tensor) -> None:
        self.cos = cos
        self.signed_sin = signed_sin
        self.positions = positions
        self._looked_up: tuple[Tensor, Tensor] | None = None

    def apply(self, x: Tensor) -> Tensor:
        """Rotate the heads `x` `[T, h, D]`; cosines and sines are looked up by the first layer of a step."""
        if self._looked_up is None or self._looked_up[0].dtype != x.dtype:
            tables = (table.index_select(0, self.positions) for table in (self.cos, self.signed_sin))
            cos, signed_sin = (rows.unsqueeze(1).to(x.dtype) for rows in tables)
            self._looked_up = cos, signed_sin
        return apply_rotary(x, *self._looked_up)


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Angle per position of each pair of dimensions, `[D / 2]`, stretched by the Llama 3.1 rule if asked.

    That rule keeps wavelengths shorter than `original / high_freq_factor`, divides by `factor` those longer
    than `original / low_freq_factor`, and interpolates between (Llama 3 technical report,
    arXiv:2407.21783, and its reference code).
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies = 1.0 / (theta**exponents)
    if scaling is None:
        return frequencies
    wavelengths = 2 * math.pi / frequencies
    cycles = scaling.original_max_position_embeddings / wavelengths
    span = scaling.high_freq_factor - scaling.low_freq_factor
    kept = ((cycles - scaling.low_freq_factor) / span).clamp(0.0, 1.0)
    return frequencies / scaling.factor * (1 - kept) + frequencies * kept


def apply_rotary(x: Tensor, cos: Tensor, signed_sin: Tensor) -> Tensor:
    """Rotate the heads `x` `[T, h, D]`; with halves (a, b): (a cos - b sin, b cos + a sin)."""
    tokens, heads, size = x.shape
    swapped = x.view(tokens, heads, 2, size // 2).flip(-2).view(x.shape)
    return torch.addcmul(x * cos, swapped, signed_sin)
