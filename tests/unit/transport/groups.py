"""A hub and its links in one process, and something that happens meanwhile, for tests."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tprt.transport.channel import WorkerHub, WorkerLink
from tprt.transport.hub import ShmWorkerHub
from tprt.transport.link import ShmWorkerLink
from tprt.transport.remote_link import RemoteWorkerLink
from tprt.transport.remote_writer import RemoteStepWriter
from tprt.transport.shm_ring import RingGeometry
from tprt.transport.spread_hub import SpreadWorkerHub


@dataclass
class Group:
    """A hub and its links, all connected; `kind` is `inproc`, `shm` or `spread`."""

    kind: str
    hub: WorkerHub
    links: list[WorkerLink]


def connect_group(path: str, world_size: int, **listen: Any) -> Group:
    """Return a hub at `path` and its links, all in this process."""
    # As many messages as the twin of this in one process holds.
    geometry = listen.pop("geometry", RingGeometry(num_slots=8))
    hub = ShmWorkerHub.listen(path, epoch=0, world_size=world_size, geometry=geometry, **listen)
    with ThreadPoolExecutor(world_size) as pool:
        joining = [
            pool.submit(ShmWorkerLink.connect, path, epoch=0, rank=rank, timeout_s=10.0)
            for rank in range(world_size)
        ]
        hub.accept_all(10.0)
        return Group("shm", hub, [future.result() for future in joining])


def connect_spread_group(path: str, world_size: int) -> Group:
    """Return a hub at `path` and a port, and links of which that of rank 0 alone is on its host."""
    local = ShmWorkerHub.listen(path, epoch=0, world_size=1, geometry=RingGeometry(num_slots=8))
    ranks = range(1, world_size)
    remote = RemoteStepWriter.listen("tcp://127.0.0.1:0", epoch=0, ranks=ranks, token=b"token")
    hub = SpreadWorkerHub(local, remote)
    with ThreadPoolExecutor(world_size) as pool:
        first = pool.submit(ShmWorkerLink.connect, path, epoch=0, rank=0, timeout_s=10.0)
        others = [
            pool.submit(
                RemoteWorkerLink.connect, remote.address, epoch=0, rank=rank, token=b"token", timeout_s=10.0
            )
            for rank in ranks
        ]
        hub.accept_all(10.0)
        return Group("spread", hub, [first.result(), *(future.result() for future in others)])


@contextlib.contextmanager
def later(delay_s: float, function: Callable[..., Any], *args: Any) -> Iterator[None]:
    """Call `function` in another thread while the block runs; it is over when the block is left."""
    timer = threading.Timer(delay_s, function, args)
    timer.start()
    try:
        yield
    finally:
        timer.join()
