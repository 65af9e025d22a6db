"""The tensor-parallel group of one rank: who it is among how many, and the collectives that join them.

A layer sees nothing else of its peers. Building and loading a shard takes a rank and a world size and no
collectives, so sharding is tested in one process. Knows nothing of how a collective moves its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

from tprt.errors import TransportError


class Collectives(Protocol):
    """What every rank of a group calls together, in the same order and with matching arguments.

    Every wait has a deadline. All methods raise:
        PeerLostError: a rank of the group is gone; the message names it.
        TransportTimeoutError: a rank did not come to the collective in time.

    After either error the group is unusable: close it and build a new one.

    Attributes:
        capturable: whether CUDA graphs can hold sums and gathers. Those are kernels, and raise nothing.
    """

    capturable: bool

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor`, of any shape, over all ranks, in place; return it. All ranks get the same bits."""

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """Return the tensors of all ranks concatenated along `dim` in rank order, on every rank.

        `sizes[r]` is rank r's size along `dim`, 0 included; the other dimensions are equal.
        """

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Overwrite `tensor` with that of rank `src`; return it."""

    def min_int(self, value: int) -> int:
        """Return the least `value` of all ranks."""

    def barrier(self) -> None:
        """Return when every rank has called it."""

    def close(self) -> None:
        """Release everything; idempotent. Peers that still wait see it as a lost rank."""


class GroupObserver(Protocol):
    """Who is told where this rank is, so that others can see where it is stuck; must cost next to nothing."""

    def enter_layer(self, layer: int) -> None:
        """Layer number `layer` of the model begins."""

    def leave_layers(self) -> None:
        """The last layer is done."""

    def enter_collective(self, number: int, name: str) -> None:
        """Collective number `number` of this rank begins; `name` is that of the method."""

    def leave_collective(self) -> None:
        """It is done; not called when it fails."""


class _NoObserver:
    """Nobody is told."""

    def enter_layer(self, layer: int) -> None:
        pass

    def leave_layers(self) -> None:
        pass

    def enter_collective(self, number: int, name: str) -> None:
        pass

    def leave_collective(self) -> None:
        pass


class _ShapesAlone:
    """`Collectives` without peers: nothing that comes out has the right values."""

    capturable = False

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        shape = list(tensor.shape)
        shape[dim] = sum(sizes)
        return tensor.new_empty(shape)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        return tensor

    def min_int(self, value: int) -> int:
        return value

    def barrier(self) -> None:
        pass

    def close(self) -> None:
        pass


class TPGroup:
    """Rank `rank` of `world_size`; at world size 1 every collective is the identity.

    Attributes:
        rank: this process's place, from 0 to `world_size - 1`.
        world_size: number of ranks.
        collective_number: collectives that this rank has begun; a rank that is behind its peers is stuck.
        collectives: what joins the ranks, None where nothing does.
        observer: who is told of collectives and, by the model, of layers; set it before the first one.

    Raises:
        TransportError: a collective was called on more than one rank and the group has none.
    """

    __slots__ = ("collective_number", "collectives", "observer", "rank", "world_size")

    def __init__(self, rank: int, world_size: int, collectives: Collectives | None = None) -> None:
        if not 0 <= rank < world_size:
            raise TransportError(
                f"rank {rank} of world size {world_size}: expected a rank from 0 to {world_size - 1}"
            )
        self.rank = rank
        self.world_size = world_size
        self.collective_number = 0
        self.observer: GroupObserver = _NoObserver()
        self.collectives = collectives

    @property
    def capturable(self) -> bool:
        """Whether CUDA graphs can hold sums and gathers of this group."""
        return self.world_size == 1 or (self.collectives is not None and self.collectives.capturable)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks in place and return it; see `Collectives.all_reduce`."""
        if self.world_size == 1:
            return tensor
        result = self._begin("all_reduce").all_reduce(tensor)
        self.observer.leave_collective()
        return result

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """Concatenate the tensors of all ranks along `dim`; see `Collectives.all_gather`.

        Raises:
            TransportError: `sizes` does not have one entry per rank, or this rank's is not its own size.
        """
        if len(sizes) != self.world_size or tensor.shape[dim] != sizes[self.rank]:
            raise TransportError(
                f"all_gather on rank {self.rank} of {self.world_size}: tensor {list(tensor.shape)}, dim {dim},"
                f" sizes {list(sizes)}; expected one size per rank, and this rank's to be that of its tensor"
            )
        if self.world_size == 1:
            return tensor
        result = self._begin("all_gather").all_gather(tensor, sizes, dim)
        self.observer.leave_collective()
        return result

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Overwrite `tensor` with that of rank `src` and return it.

        Raises:
            TransportError: `src` is not a rank of this group.
        """
        if not 0 <= src < self.world_size:
            raise TransportError(f"broadcast from rank {src}: expected a rank from 0 to {self.world_size - 1}")
        if self.world_size == 1:
            return tensor
        result = self._begin("broadcast").broadcast(tensor, src)
        self.observer.leave_collective()
        return result

    def min_int(self, value: int) -> int:
        """Return the least `value` of all ranks."""
        if self.world_size == 1:
            return value
        result = self._begin("min_int").min_int(value)
        self.observer.leave_collective()
        return result

    def barrier(self) -> None:
        """Return when every rank has called it."""
        if self.world_size > 1:
            self._begin("barrier").barrier()
            self.observer.leave_collective()

    @contextmanager
    def disjoined(self) -> Iterator[None]:
        """Have collectives return something of the right shape, and neither send nor wait."""
        joined, number = self.collectives, self.collective_number
        self.collectives = _ShapesAlone()
        try:
            yield
        finally:
            self.collectives, self.collective_number = joined, number

    def close(self) -> None:
        """Release the collectives; idempotent."""
        if self.collectives is not None:
            self.collectives.close()

    def _begin(self, name: str) -> Collectives:
        if self.collectives is None:
            raise TransportError(
                f"{name} on rank {self.rank} of {self.world_size}: this group was built without collectives,"
                " which is enough to build and load a shard; pass collectives to TPGroup to compute with it"
            )
        self.collective_number += 1
        self.observer.enter_collective(self.collective_number, name)
        return self.collectives
