"""Collectives between threads of one process, for tests: one thread plays one rank.

They sum in rank order, in float32 for 16-bit floats, so results equal those of `shm_collectives` bit for
bit. Knows nothing of processes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tprt.distributed.tp_group import TPGroup
from tprt.errors import PeerLostError, TransportError, TransportTimeoutError


def make_local_groups(world_size: int, timeout_s: float = 10.0) -> list[TPGroup]:
    """Return one group per rank; use each from a thread of its own. No wait is longer than `timeout_s`."""
    exchange = _Exchange(world_size, timeout_s)
    return [TPGroup(rank, world_size, LocalCollectives(rank, exchange)) for rank in range(world_size)]


class LocalCollectives:
    """One rank's end; see `Collectives` for the methods."""

    capturable = False

    def __init__(self, rank: int, exchange: _Exchange) -> None:
        self._rank = rank
        self._exchange = exchange

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks in place and return it."""
        parts = self._exchange.swap(self._rank, "all_reduce", tensor.clone())
        total = parts[0].float() if tensor.dtype in (torch.bfloat16, torch.float16) else parts[0].clone()
        for part in parts[1:]:
            total.add_(part)
        return tensor.copy_(total)

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """Return the tensors of all ranks concatenated along `dim`, where rank r's has size `sizes[r]`."""
        parts = self._exchange.swap(self._rank, "all_gather", tensor.clone())
        found = [part.shape[dim] for part in parts]
        if found != list(sizes):
            raise TransportError(f"all_gather with sizes {list(sizes)}, but the ranks brought {found}")
        return torch.cat(parts, dim)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Overwrite `tensor` with that of rank `src` and return it."""
        return tensor.copy_(self._exchange.swap(self._rank, f"broadcast from rank {src}", tensor.clone())[src])

    def min_int(self, value: int) -> int:
        """Return the least `value` of all ranks."""
        values = self._exchange.swap(self._rank, "min_int", torch.tensor(value, dtype=torch.int64))
        return min(int(other) for other in values)

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._exchange.swap(self._rank, "barrier", torch.empty(0))

    def close(self) -> None:
        """Leave the group; peers that wait for this rank see that it is gone."""
        self._exchange.leave(self._rank)


class _Exchange:
    """The meeting point of all ranks: in its n-th swap each rank gets what every rank brought to its n-th."""

    def __init__(self, world_size: int, timeout_s: float) -> None:
        self._world_size = world_size
        self._timeout_s = timeout_s
        self._changed = threading.Condition()
        self._numbers = [0] * world_size
        self._rounds: dict[int, dict[int, tuple[str, Tensor]]] = {}
        self._gone: set[int] = set()

    def swap(self, rank: int, name: str, tensor: Tensor) -> list[Tensor]:
        with self._changed:
            self._numbers[rank] += 1
            number = self._numbers[rank]
            brought = self._rounds.setdefault(number, {})
            brought[rank] = name, tensor
            self._changed.notify_all()
            is_over = self._is_over(brought)
            if not self._changed.wait_for(is_over, self._timeout_s) or len(brought) < self._world_size:
                self._raise_missing(rank, number, brought)
            # All ranks are past the round before this one, or they would not have come here.
            self._rounds.pop(number - 1, None)
        names = [brought[peer][0] for peer in range(self._world_size)]
        if len(set(names)) > 1:
            raise TransportError(f"the ranks have diverged: they are in {', '.join(names)}")
        return [brought[peer][1] for peer in range(self._world_size)]

    def leave(self, rank: int) -> None:
        with self._changed:
            self._gone.add(rank)
            self._changed.notify_all()

    def _is_over(self, brought: dict[int, tuple[str, Tensor]]) -> Callable[[], bool]:
        return lambda: len(brought) == self._world_size or any(peer not in brought for peer in self._gone)

    def _raise_missing(self, rank: int, number: int, brought: dict[int, tuple[str, Tensor]]) -> None:
        missing = [peer for peer in range(self._world_size) if peer not in brought]
        names = ", ".join(str(peer) for peer in missing)
        if self._gone.intersection(missing):
            raise PeerLostError(f"rank {names} has closed the group; rank {rank} is in collective {number}")
        raise TransportTimeoutError(
            f"rank {rank} has waited {self._timeout_s:g} s in collective {number} for rank {names}"
        )
