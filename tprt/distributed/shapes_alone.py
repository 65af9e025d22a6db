"""Collectives without peers, for a rank that only wants to know what it launches. Knows nothing of devices."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


class ShapesAlone:
    """`Collectives` that give tensors of the right shapes, and of any values."""

    capturable = False

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Return `tensor`."""
        return tensor

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """Return memory for all ranks' tensors."""
        shape = list(tensor.shape)
        shape[dim] = sum(sizes)
        return tensor.new_empty(shape)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Return `tensor`."""
        return tensor

    def min_int(self, value: int) -> int:
        """Return `value`."""
        return value

    def barrier(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def disjoined(self) -> ShapesAlone:
        """Return itself."""
        return self
