"""What becomes of the projected heads of a token before it attends. Knows nothing of Triton."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class HeadNorms:
    """Weights `[D]` of the query and the key norm."""

    query: Tensor
    key: Tensor
    eps: float


@dataclass(frozen=True, slots=True)
class Preparation:
    """Queries and keys are normalised per head (where the model does that) and rotated.

    Attributes:
        cos, signed_sin: of every position, `[P, D]` in float32.
        positions: `[T]` int64, of the tokens.
        norms: None for a model without them.
    """

    cos: Tensor
    signed_sin: Tensor
    positions: Tensor
    norms: HeadNorms | None

    def weights(self, unused: Tensor) -> tuple[Tensor, Tensor, float]:
        """Return the norms' weights and eps for a kernel that is told whether to look: `unused` for none."""
        return (
            (unused, unused, 0.0) if self.norms is None else (self.norms.query, self.norms.key, self.norms.eps)
        )
