"""Ranks of several hosts meet in a store whose port nobody can take in between, epoch after epoch."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tprt.distributed.factory import GroupDeadlines, make_group
from tprt.distributed.torch_collectives import TcpMeeting, meet_in_store, tcp_store
from tprt.errors import TransportError, TransportTimeoutError

WAIT_S = 10.0


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


def meet(listener: socket.socket, rank: int, epoch: int, world_size: int, timeout_s: float) -> object:
    """Return the store, which must not end before others have met in it."""
    fd = listener.fileno() if rank == 0 else None
    store = tcp_store(TcpMeeting("127.0.0.1", listener.getsockname()[1], epoch, fd), WAIT_S)
    meet_in_store(store, rank, world_size, timeout_s)
    return store


def test_ranks_of_one_epoch_after_another_meet_at_one_port(listener: socket.socket) -> None:
    for epoch in (0, 1):
        with ThreadPoolExecutor(2) as pool:
            meetings = [pool.submit(meet, listener, rank, epoch, 2, WAIT_S) for rank in (1, 0)]
            assert all(meeting.result(WAIT_S) for meeting in meetings)
        # The ranks of an epoch have ended before the next ones begin: their store would take these in.
        meetings.clear()


def test_a_rank_of_an_earlier_epoch_is_not_taken_for_one_of_this(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    keeper = tcp_store(TcpMeeting("127.0.0.1", port, 1, listener.fileno()), WAIT_S)
    late = tcp_store(TcpMeeting("127.0.0.1", port, 0), WAIT_S)
    late.set("tprt-rank-1", "")
    with pytest.raises(TransportTimeoutError, match=r"of 2 ranks, \[1\] did not come to the rendezvous"):
        meet_in_store(keeper, 0, 2, 0.2)


def test_a_store_that_nobody_keeps_is_named(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    with pytest.raises(TransportTimeoutError, match=rf"no rank keeps the store .* 127\.0\.0\.1, port {port}"):
        tcp_store(TcpMeeting("127.0.0.1", port, 0), 1.0)


def test_shared_memory_between_hosts_is_refused() -> None:
    cpu, meeting = torch.device("cpu"), TcpMeeting("127.0.0.1", 1, 0)
    with pytest.raises(TransportError, match="backend shm joins the ranks of one host only"):
        make_group("shm", 0, 2, cpu, meeting, GroupDeadlines(1.0, 1.0))
