"""Makes the tensor-parallel group of a rank from plain values.

Knows nothing of settings or of the environment: whoever starts the ranks chooses the backend.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import torch
from torch.distributed.distributed_c10d import Store

from tprt.distributed.shm_collectives import ShmCollectives
from tprt.distributed.shm_rendezvous import exchange_memory
from tprt.distributed.symm_mem import SymmMemCollectives
from tprt.distributed.torch_collectives import (
    Rendezvous,
    TcpMeeting,
    TorchCollectives,
    file_store,
    meet_in_store,
    tcp_store,
)
from tprt.distributed.tp_group import TPGroup
from tprt.errors import TransportError

CollectiveBackend = Literal["shm", "gloo", "nccl", "symm_mem"]

_SOCKET_NAME = "collectives.sock"
_STORE_NAME = "collectives.store"


@dataclass(frozen=True, slots=True)
class GroupDeadlines:
    """Longest waits for the other ranks, in seconds: until all have come, and in a collective."""

    meet_s: float
    collective_s: float


def make_group(
    backend: CollectiveBackend,
    rank: int,
    world_size: int,
    device: torch.device,
    meeting: str | TcpMeeting,
    deadlines: GroupDeadlines,
) -> TPGroup:
    """Meet the other ranks and return the group, ready for collectives.

    Args:
        backend: shm between CPU ranks; nccl between CUDA devices; symm_mem between CUDA devices that can read
            each other's memory, or ranks that share one; gloo anywhere.
        rank: this rank.
        world_size: number of ranks; 1 needs no peers and gets a group without collectives.
        device: where the tensors of this rank are.
        meeting: where ranks of one host meet: an existing directory, private to this one group, so that one
            that takes the place of a failed group needs a new one; or where those of several hosts do.
        deadlines: longest waits for the other ranks.

    Raises:
        TransportError: the backend does not fit the device, or the group could not be formed.
        TransportTimeoutError: a rank did not come in time.
        PeerLostError: a rank went away meanwhile.
    """
    if world_size == 1:
        return TPGroup(rank, world_size)
    _check_device(backend, device)
    if backend == "shm":
        if isinstance(meeting, TcpMeeting):
            raise TransportError("backend shm joins the ranks of one host only; take gloo between hosts")
        path = os.path.join(meeting, _SOCKET_NAME)
        memory = exchange_memory(path, rank, world_size, deadlines.meet_s)
        try:
            return TPGroup(rank, world_size, ShmCollectives(rank, world_size, memory, deadlines.collective_s))
        finally:
            memory.close()
    if isinstance(meeting, TcpMeeting):
        store = tcp_store(meeting, deadlines.meet_s)
    else:
        store = file_store(os.path.join(meeting, _STORE_NAME), world_size)
    meet_in_store(store, rank, world_size, deadlines.meet_s)
    rendezvous = Rendezvous(store=store, timeout_s=deadlines.collective_s)
    if backend == "gloo":
        return TPGroup(rank, world_size, TorchCollectives("gloo", rank, world_size, device, rendezvous))
    devices = _exchange_devices(store, rank, world_size, device)
    is_shared = len(set(devices)) < world_size
    if backend == "nccl" and is_shared:
        raise TransportError(
            f"nccl refuses ranks that share a CUDA device: theirs are {devices}; take symm_mem"
        )
    carrier = TorchCollectives("gloo" if is_shared else "nccl", rank, world_size, device, rendezvous)
    if backend == "nccl":
        return TPGroup(rank, world_size, carrier)
    return TPGroup(rank, world_size, SymmMemCollectives(rank, devices, device, carrier, deadlines.collective_s))


def _exchange_devices(store: Store, rank: int, world_size: int, device: torch.device) -> list[str]:
    """Return the unique id of every rank's CUDA device."""
    keys = [f"tprt-device-{number}" for number in range(world_size)]
    store.set(keys[rank], str(torch.cuda.get_device_properties(device).uuid))
    return [store.get(key).decode() for key in keys]


def _check_device(backend: CollectiveBackend, device: torch.device) -> None:
    fits = {"shm": ("cpu",), "gloo": ("cpu", "cuda"), "nccl": ("cuda",), "symm_mem": ("cuda",)}
    if device.type not in fits[backend]:
        raise TransportError(
            f"backend {backend} on device {device}: it works on {' and '.join(fits[backend])};"
            " take nccl or symm_mem for CUDA devices and shm for CPUs, or gloo"
        )
