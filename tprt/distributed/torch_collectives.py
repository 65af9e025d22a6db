"""Collectives over `torch.distributed`: nccl between CUDA devices, gloo between CPUs or shared GPUs.

It takes the process's default group, so a process has one of these at a time. Which network interface gloo
uses is the environment's affair (`GLOO_SOCKET_IFNAME`). Knows nothing of who starts the ranks.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from tprt.errors import PeerLostError, TransportError, TransportTimeoutError

TorchBackend = Literal["gloo", "nccl"]

# gloo and nccl raise a plain RuntimeError for everything, and name no rank; their words are all there is.
_LOST_WORDS = ("closed by peer", "reset by peer", "broken pipe", "remote process exited")
_LATE_WORDS = ("timed out", "timeout")


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the ranks of a group find each other: a store that exists, or an `init_method` of torch.

    Attributes:
        store: `FileStore`, `TCPStore` or the like; None takes `init_method`.
        init_method: `"env://"`, `"tcp://host:port"` or `"file:///path"`.
        timeout_s: longest wait for the other ranks, here and in a collective, in seconds.
    """

    store: Store | None = None
    init_method: str = "env://"
    timeout_s: float = 600.0


def file_store(path: str, world_size: int) -> Store:
    """Return a store for the ranks of one host; the file at `path` must be new and belongs to this group."""
    store: Store = dist.FileStore(path, world_size)  # type: ignore[attr-defined]  # torch exports it implicitly
    return store


@dataclass(frozen=True, slots=True)
class TcpMeeting:
    """Where the ranks of several hosts meet: a store that one of them keeps.

    Attributes:
        host, port: where it listens.
        epoch: number of the worker group; what others have left in the store is not seen.
        listener: the descriptor of a socket that listens there, of the rank that keeps the store; others: None.
    """

    host: str
    port: int
    epoch: int
    listener: int | None = None


def tcp_store(meeting: TcpMeeting, timeout_s: float) -> Store:
    """Return the store of a meeting, which takes over a duplicate of its listener.

    Raises:
        TransportTimeoutError: nobody keeps it there within `timeout_s`.
    """
    try:
        store: Store = dist.TCPStore(  # type: ignore[attr-defined]  # torch exports it implicitly
            meeting.host,
            meeting.port,
            is_master=meeting.listener is not None,
            wait_for_workers=False,
            timeout=timedelta(seconds=timeout_s),
            master_listen_fd=None if meeting.listener is None else os.dup(meeting.listener),
        )
    except RuntimeError as error:  # DistNetworkError
        raise TransportTimeoutError(
            f"no rank keeps the store of ranks at {meeting.host}, port {meeting.port}, after {timeout_s:g} s"
        ) from error
    prefixed: Store = PrefixStore(f"tprt-{meeting.epoch}", store)
    return prefixed


def meet_in_store(store: Store, rank: int, world_size: int, timeout_s: float) -> None:
    """Wait until every rank of the group has come to `store`.

    Raises:
        TransportTimeoutError: names the ranks that did not come in time.
    """
    keys = [f"tprt-rank-{number}" for number in range(world_size)]
    store.set(keys[rank], "")
    try:
        store.wait(keys, timedelta(seconds=timeout_s))
    except RuntimeError as error:  # DistStoreError
        missing = [number for number, key in enumerate(keys) if not store.check([key])]
        raise TransportTimeoutError(
            f"of {world_size} ranks, {missing} did not come to the rendezvous within {timeout_s:g} s"
        ) from error


class TorchCollectives:
    """One rank's end of the default process group; see `Collectives` for the methods.

    Results of gloo have the same bits on all ranks. Tensors are on `device`.

    Args:
        backend: gloo or nccl.
        rank: this rank.
        world_size: number of ranks.
        device: where the tensors of this rank are; nccl wants a CUDA device of its own.
        rendezvous: where the ranks find each other, and the deadline.

    Attributes:
        capturable: whether CUDA graphs can hold its collectives.

    Raises:
        TransportError: this process has a default group already, or the group could not be formed.
        TransportTimeoutError: not all ranks came in time.
    """

    def __init__(
        self, backend: TorchBackend, rank: int, world_size: int, device: torch.device, rendezvous: Rendezvous
    ) -> None:
        if dist.is_initialized():
            raise TransportError(
                "this process has a torch.distributed default group already; close it before making another"
            )
        self.capturable = backend == "nccl"
        self._rank = rank
        self._backend = backend
        self._device = device
        with self._errors("init_process_group"):
            dist.init_process_group(
                backend,
                init_method=None if rendezvous.store is not None else rendezvous.init_method,
                store=rendezvous.store,
                rank=rank,
                world_size=world_size,
                timeout=timedelta(seconds=rendezvous.timeout_s),
                device_id=device if backend == "nccl" else None,
            )
        self._open = True

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks in place and return it."""
        whole = tensor.contiguous()
        with self._errors("all_reduce"):
            dist.all_reduce(whole)
        return tensor if whole is tensor else tensor.copy_(whole)

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """Return the tensors of all ranks concatenated along `dim`, where rank r's has size `sizes[r]`.

        gloo wants equal sizes, so every rank sends as much as the largest one.
        """
        dim %= tensor.dim()
        shapes = [(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]) for size in sizes]
        numels = [math.prod(shape) for shape in shapes]
        if max(numels) == 0:
            return tensor.new_empty((*tensor.shape[:dim], sum(sizes), *tensor.shape[dim + 1 :]))
        padded = tensor.new_zeros(max(numels))
        padded[: tensor.numel()].copy_(tensor.reshape(-1))
        gathered = [torch.empty_like(padded) for _ in sizes]
        with self._errors("all_gather"):
            dist.all_gather(gathered, padded)
        parts = zip(gathered, numels, shapes, strict=True)
        return torch.cat([flat[:numel].view(shape) for flat, numel, shape in parts], dim)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Overwrite `tensor` with that of rank `src` and return it."""
        whole = tensor.contiguous()
        with self._errors("broadcast"):
            dist.broadcast(whole, src)
        return tensor if whole is tensor else tensor.copy_(whole)

    def min_int(self, value: int) -> int:
        """Return the least `value`, a signed 64-bit integer, of all ranks."""
        # gloo would take it off a device first.
        device = self._device if self._backend == "nccl" else torch.device("cpu")
        least = torch.tensor([value], dtype=torch.int64, device=device)
        with self._errors("min_int"):
            dist.all_reduce(least, op=dist.ReduceOp.MIN)
        return int(least.item())

    def barrier(self) -> None:
        """Return when every rank has called it."""
        # An all-reduce that is waited for: dist.barrier guesses a device and warns about it.
        self.min_int(0)

    def close(self) -> None:
        """Release the process group; idempotent."""
        if self._open:
            self._open = False
            dist.destroy_process_group()

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            message = f"{self._backend} {name} on rank {self._rank} failed: {text}"
            if any(words in text.lower() for words in _LOST_WORDS):
                raise PeerLostError(message) from error
            if any(words in text.lower() for words in _LATE_WORDS):
                raise TransportTimeoutError(message) from error
            raise TransportError(message) from error
