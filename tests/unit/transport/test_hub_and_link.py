"""How ranks come to a hub over a unix socket: who is let in, who is told why not, and who is missed."""

from __future__ import annotations

import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.unit.transport.groups import Group, connect_group, later
from tprt.errors import PeerLostError, TransportError, TransportTimeoutError
from tprt.transport.channel import ControlEvent
from tprt.transport.hub import ShmWorkerHub
from tprt.transport.link import ShmWorkerLink
from tprt.transport.shm_ring import RingGeometry

WAIT_S = 10.0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


@pytest.fixture
def hub(run_dir: Path) -> Iterator[ShmWorkerHub]:
    hub = ShmWorkerHub.listen(f"{run_dir}/hub", epoch=3, world_size=2)
    yield hub
    hub.close()


@pytest.fixture
def join(
    run_dir: Path, pool: ThreadPoolExecutor, hub: ShmWorkerHub
) -> Iterator[Callable[..., Future[ShmWorkerLink]]]:
    """Let a rank connect in a thread of its own; every link is closed at the end."""
    joining: list[Future[ShmWorkerLink]] = []

    def start(rank: int, epoch: int = 3) -> Future[ShmWorkerLink]:
        path = f"{run_dir}/hub"
        future = pool.submit(ShmWorkerLink.connect, path, epoch=epoch, rank=rank, timeout_s=WAIT_S)
        joining.append(future)
        return future

    yield start
    hub.close()
    for future in joining:
        if future.exception(WAIT_S) is None:
            future.result().close()


Join = Callable[..., "Future[ShmWorkerLink]"]


def test_ranks_in_any_order_are_all_accepted(hub: ShmWorkerHub, join: Join) -> None:
    links = [join(1), join(0)]
    hub.accept_all(WAIT_S)
    hub.steps.send([b"step"], WAIT_S)
    for link in links:
        assert link.result(WAIT_S).steps.receive(WAIT_S) == b"step"
    assert hub.pids == {0: os.getpid(), 1: os.getpid()}


def test_missing_ranks_are_named(hub: ShmWorkerHub, join: Join) -> None:
    join(1)
    with pytest.raises(TransportTimeoutError, match=r"of 2 ranks, \[0\] have not connected after 0\.2 s"):
        hub.accept_all(0.2)
    join(0)
    hub.accept_all(WAIT_S)


def test_a_rank_that_goes_before_all_have_come_ends_the_wait_and_its_words_are_kept(
    hub: ShmWorkerHub, join: Join
) -> None:
    def fail() -> None:
        link = future.result(WAIT_S)
        link.send_control(b"out of memory", WAIT_S)
        time.sleep(0.05)
        link.close()

    future = join(1)
    thread = threading.Thread(target=fail)
    thread.start()
    begin_s = time.monotonic()
    with pytest.raises(PeerLostError, match=rf"rank 1 \(process {os.getpid()}\) went away before \[0\]"):
        hub.accept_all(WAIT_S)
    assert time.monotonic() - begin_s < WAIT_S / 2
    thread.join()
    assert hub.receive_control(WAIT_S) == ControlEvent(1, b"out of memory")
    assert hub.receive_control(WAIT_S) == ControlEvent(1, None)


@pytest.mark.parametrize(
    ("rank", "epoch", "reason"),
    [
        (0, 2, "refuses rank 0: it was started for epoch 2; this is epoch 3"),
        (2, 3, "refuses rank 2: it calls itself rank 2; expected 0 to 1"),
        (-1, 3, "refuses rank -1: it calls itself rank -1; expected 0 to 1"),
    ],
)
def test_a_rank_that_does_not_belong_is_told_why(
    hub: ShmWorkerHub, join: Join, rank: int, epoch: int, reason: str
) -> None:
    future = join(rank, epoch)
    with pytest.raises(TransportTimeoutError, match=r"\[0, 1\] have not connected"):
        hub.accept_all(0.2)
    with pytest.raises(TransportError, match=reason):
        future.result(WAIT_S)


def test_a_rank_that_connects_twice_is_refused_and_the_first_one_stays(hub: ShmWorkerHub, join: Join) -> None:
    links = [join(0), join(1)]
    hub.accept_all(WAIT_S)
    second = join(1)
    # By now the door is one of the things that `receive_control` looks after.
    assert hub.receive_control(0.2) is None
    with pytest.raises(TransportError, match="rank 1 has connected before"):
        second.result(WAIT_S)
    hub.steps.send([b"step"], WAIT_S)
    assert links[1].result(WAIT_S).steps.receive(WAIT_S) == b"step"


def test_a_process_of_another_user_is_refused(
    hub: ShmWorkerHub, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    future = join(0)
    with pytest.raises(TransportTimeoutError):
        hub.accept_all(0.2)
    with pytest.raises(TransportError, match=f"belongs to user {mine}; expected user {mine + 1}"):
        future.result(WAIT_S)


@pytest.mark.parametrize("said", [b"GET /", b"tprthand" + bytes(100), b""], ids=["other", "version", "nothing"])
def test_a_stranger_is_told_off_and_keeps_nobody_out(
    run_dir: Path, hub: ShmWorkerHub, join: Join, said: bytes
) -> None:
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as gone,
    ):
        stranger.connect(f"{run_dir}/hub")
        gone.connect(f"{run_dir}/hub")
        gone.close()
        if said:
            stranger.send(said)
        for rank in range(2):
            join(rank)
        hub.accept_all(WAIT_S)
        if said:
            stranger.settimeout(WAIT_S)
            assert b"expected a tprt worker" in stranger.recv(4096)


def test_ranks_can_be_let_in_from_a_poller(hub: ShmWorkerHub, join: Join) -> None:
    poller = select.poll()
    for fd in hub.filenos():
        poller.register(fd, select.POLLIN)
    links = [join(0), join(1)]
    while not all(link.done() for link in links):
        if poller.poll(100):
            assert hub.receive_control(0.0) is None
    hub.accept_all(0.0)


def test_a_rank_may_come_before_the_hub(run_dir: Path, pool: ThreadPoolExecutor) -> None:
    path = f"{run_dir}/late"
    future = pool.submit(ShmWorkerLink.connect, path, epoch=0, rank=0, timeout_s=WAIT_S)
    time.sleep(0.05)
    hub = ShmWorkerHub.listen(path, epoch=0, world_size=1)
    hub.accept_all(WAIT_S)
    future.result(WAIT_S).close()
    hub.close()


def test_a_rank_without_a_hub_gives_up_in_time(run_dir: Path) -> None:
    with pytest.raises(TransportTimeoutError, match=r"no coordinator listens at .*/none after 0\.1 s"):
        ShmWorkerLink.connect(f"{run_dir}/none", epoch=0, rank=0, timeout_s=0.1)


def test_a_rank_that_is_not_answered_gives_up_in_time(run_dir: Path, hub: ShmWorkerHub) -> None:
    with pytest.raises(TransportTimeoutError, match=r"did not answer in 0\.1 s"):
        ShmWorkerLink.connect(f"{run_dir}/hub", epoch=3, rank=0, timeout_s=0.1)


def test_a_rank_sees_a_hub_that_closes_before_it_has_answered(hub: ShmWorkerHub, join: Join) -> None:
    future = join(0)
    time.sleep(0.1)
    hub.close()
    with pytest.raises(PeerLostError, match="went away"):
        future.result(WAIT_S)


def test_a_socket_that_a_dead_hub_has_left_is_replaced_but_a_living_one_is_not(run_dir: Path) -> None:
    path = f"{run_dir}/hub"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as dead:
        dead.bind(path)
    hub = ShmWorkerHub.listen(path, epoch=0, world_size=1)
    with pytest.raises(TransportError, match=r"cannot listen at .*: Address already in use"):
        ShmWorkerHub.listen(path, epoch=1, world_size=1)
    hub.close()


@pytest.mark.parametrize("path", ["/no/such/folder/hub", f"/tmp/{'x' * 101}"])
def test_a_path_that_cannot_be_used_is_refused(path: str, no_descriptor_is_left: None) -> None:
    with pytest.raises(TransportError, match=r"a folder that exists|a shorter path"):
        ShmWorkerHub.listen(path, epoch=0, world_size=1)


def test_an_impossible_world_size_leaves_nothing(run_dir: Path) -> None:
    with pytest.raises(TransportError, match="a ring for 0 readers"):
        ShmWorkerHub.listen(f"{run_dir}/hub", epoch=0, world_size=0)


def test_eight_hubs_at_once_do_not_collide(run_dir: Path) -> None:
    groups: list[Group] = [connect_group(f"{run_dir}/hub{number}", 2) for number in range(8)]
    for number, group in enumerate(groups):
        for size in (10, 300_000):
            group.hub.steps.send([b"%d" % number * size], WAIT_S)
    for number, group in enumerate(groups):
        for size in (10, 300_000):
            for link in group.links:
                assert link.steps.receive(WAIT_S) == b"%d" % number * size
        assert group.links[0].outputs is not None
        group.links[0].outputs.send([b"%d" % number * 100_000], WAIT_S)
    for number, group in enumerate(groups):
        assert group.hub.receive_output(WAIT_S) == b"%d" % number * 100_000
    for group in groups:
        for end in (*group.links, group.hub):
            end.close()


def test_the_size_of_the_rings_is_the_hubs_to_choose(run_dir: Path) -> None:
    group = connect_group(
        f"{run_dir}/hub", 1, geometry=RingGeometry(2, 64), outputs_geometry=RingGeometry(1, 64)
    )
    group.hub.steps.send([b"1"], WAIT_S)
    group.hub.steps.send([b"2"], WAIT_S)
    with pytest.raises(TransportTimeoutError, match="in a ring of 2"):
        group.hub.steps.send([b"3"], 0.0)
    outputs: Any = group.links[0].outputs
    outputs.send([b"1"], WAIT_S)
    with pytest.raises(TransportTimeoutError, match=r"in a ring of 1: the coordinator \(process"):
        outputs.send([b"2"], 0.0)
    for end in (*group.links, group.hub):
        end.close()


def test_a_rank_that_goes_in_the_middle_of_a_large_output_is_not_waited_for(run_dir: Path) -> None:
    group = connect_group(f"{run_dir}/hub", 1)
    outputs: Any = group.links[0].outputs
    outputs._send_large = lambda sequence, size, parts: None
    outputs.send([bytes(100_000)], WAIT_S)
    begin_s = time.monotonic()
    with later(0.2, group.links[0].close):
        assert group.hub.receive_output(WAIT_S) == ControlEvent(0, None)
    assert time.monotonic() - begin_s < 2.0
    with pytest.raises(PeerLostError, match="rank 0 is gone"):
        group.hub.receive_output(WAIT_S)
    group.hub.close()
    group.links[0].close()
