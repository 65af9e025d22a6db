"""Hosts of one deployment are let in; everyone else is refused by name, on both sides and within a deadline."""

from __future__ import annotations

import contextlib
import logging
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from launch.multihost.card import HostCard
from launch.multihost.door import Door
from launch.multihost.frames import FrameLane
from launch.multihost.handshake import pack_answer, pack_greeting
from launch.multihost.join import join
from tprt.errors import ConfigError, TransportTimeoutError

SECRET = b"of all hosts"
SETTINGS = {"cache.num_blocks": 64, "model.dtype": "float32", "parallel.tensor_parallel_size": 3}
FIRST = HostCard(
    rdzv_id="d", node_rank=0, instance="i", host="alpha", version="1", settings=SETTINGS, checkpoint="c" * 64
)
WAIT_S = 10.0
Admitted = list[tuple[HostCard, FrameLane]]


def card(**changes: Any) -> HostCard:
    return FIRST.model_copy(update={"node_rank": 1, "instance": "j", "host": "beta", **changes})


class OpenDoor:
    """A door that is served by a thread until the test ends."""

    def __init__(self, listener: socket.socket) -> None:
        self.port: int = listener.getsockname()[1]
        self.admitted: Admitted = []
        self.taken: dict[int, HostCard] = {}
        self._door = Door(listener, FIRST, 3, SECRET)
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    @property
    def last_refusal(self) -> str:
        return self._door.last_refusal

    def _serve(self) -> None:
        while not self._is_over.is_set():
            select.select(self._door.filenos(), [], [], 0.02)
            for host, lane in self._door.admit(self.taken):
                self.taken[host.node_rank] = host
                self.admitted.append((host, lane))

    def wait_for(self, count: int) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while len(self.admitted) < count:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)

    def close(self) -> None:
        self._is_over.set()
        self._thread.join()
        self._door.close()
        for _, lane in self.admitted:
            lane.close()


@pytest.fixture
def door() -> Iterator[OpenDoor]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        door = OpenDoor(listener)
        yield door
        door.close()


def come(port: int, own: HostCard, secret: bytes = SECRET, timeout_s: float = WAIT_S) -> FrameLane:
    return join("127.0.0.1", port, own, secret, timeout_s)


def test_hosts_come_in_whatever_their_order_and_what_is_sent_at_once_is_not_lost(door: OpenDoor) -> None:
    lanes = [come(door.port, card(node_rank=rank, instance=str(rank))) for rank in (2, 1)]
    door.wait_for(2)
    assert [host.node_rank for host, _ in door.admitted] == [2, 1]
    for _, there in door.admitted:
        there.send(b"one")
        there.send(b"two" * 100_000)
    for lane in lanes:
        assert lane.wait_for_message(WAIT_S) == b"one"
        assert lane.wait_for_message(WAIT_S) == b"two" * 100_000
        lane.close()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rdzv_id": "e"}, "node rank 1 belongs to deployment 'e' (hosts.rdzv_id), node rank 0 to 'd'"),
        ({"version": "2"}, "node rank 1 runs tprt 2, node rank 0 1: install one version everywhere"),
        ({"node_rank": 3}, "it calls itself node rank 3; with hosts.nnodes 3, expected 1 to 2"),
        ({"node_rank": 0}, "it calls itself node rank 0; with hosts.nnodes 3, expected 1 to 2"),
        (
            {"settings": {**SETTINGS, "cache.num_blocks": 32}},
            "settings differ: cache.num_blocks is 32 on node rank 1 and 64 on node rank 0; give all hosts",
        ),
        ({"settings": {}}, "cache.num_blocks is None on node rank 1 and 64 on node rank 0; model.dtype is"),
        ({"checkpoint": "d" * 64}, "the checkpoint of node rank 1 is another one"),
    ],
)
def test_what_differs_is_named_on_both_sides(
    door: OpenDoor, changes: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(ConfigError) as refused:
        come(door.port, card(**changes))
    assert "the host of node rank 0 at 127.0.0.1 refuses this host: " in str(refused.value)
    assert words in str(refused.value)
    assert words in door.last_refusal
    assert words in caplog.text
    assert door.admitted == []


@pytest.mark.parametrize(
    ("ahead_s", "words"),
    [(90.0, "its clock is 90.0 s ahead of this"), (-5.0, "its clock is 5.0 s behind this")],
)
def test_a_host_whose_clock_is_wrong_comes_in_and_is_named(
    door: OpenDoor,
    ahead_s: float,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        right = come(door.port, card())
        door.wait_for(1)
        assert caplog.text == ""
        monkeypatch.setattr("launch.multihost.join.clock_s", lambda: time.time() + ahead_s)
        wrong = come(door.port, card(node_rank=2, host="gamma"))
        door.wait_for(2)
    assert "node rank 2, gamma: " in caplog.text
    assert words in caplog.text
    right.close()
    wrong.close()


def test_a_wrong_secret_is_told_on_both_sides_and_the_card_is_not_believed(door: OpenDoor) -> None:
    with pytest.raises(ConfigError, match="the secret of this host is not that of node rank 0"):
        come(door.port, card(rdzv_id="e"), b"guessed")
    assert door.last_refusal == "127.0.0.1: its secret is not that of this deployment"


def test_a_node_rank_is_given_once_and_its_host_may_come_again(door: OpenDoor) -> None:
    first = come(door.port, card())
    door.wait_for(1)
    with pytest.raises(ConfigError, match=r"node rank 1 is there already, on beta; give every host a --node-r"):
        come(door.port, card(instance="k", host="gamma"))
    again = come(door.port, card())
    door.wait_for(2)
    assert [host.instance for host, _ in door.admitted] == ["j", "j"]
    first.close()
    again.close()


def test_strangers_do_not_keep_a_host_out(door: OpenDoor) -> None:
    with contextlib.ExitStack() as stack:
        for said in (b"", b"GET / HTTP/1.1\r\n\r\n", b"\xff\xff\xff\xff", b"\x02\0\0\0no"):
            stranger = stack.enter_context(socket.create_connection(("127.0.0.1", door.port)))
            stranger.sendall(said)
        come(door.port, card()).close()
    assert "its secret is not that" in door.last_refusal


def test_a_host_waits_for_one_that_listens_later() -> None:
    with socket.socket() as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(("127.0.0.1", 0))
        coming = pool.submit(come, listener.getsockname()[1], card())
        time.sleep(0.3)
        listener.listen()
        door = OpenDoor(listener)
        coming.result(WAIT_S).close()
        door.close()


def test_a_host_of_node_rank_0_that_never_comes_is_named_with_what_was_in_the_way() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        port = nobody.getsockname()[1]
        begin_s = time.monotonic()
        words = (
            rf"node rank 1: the host of node rank 0 did not answer at 127\.0\.0\.1, port {port}, within 0\.5 s:"
        )
        with pytest.raises(TransportTimeoutError, match=words + " Connection refused"):
            come(port, card(), timeout_s=0.5)
        assert time.monotonic() - begin_s < 2


def greet_as(message: bytes) -> Callable[[socket.socket], None]:
    def greet(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        lane = FrameLane(connection)
        lane.send(message)
        if lane.wait_for_message(WAIT_S) is not None:
            lane.send(pack_answer("", bytes(32), b"guessed"))
        lane.close()

    return greet


@pytest.mark.parametrize(
    ("greeting", "words"),
    [
        (b"SSH-2.0-OpenSSH_9", "it began with b'SSH-2.0-OpenSSH_'; expected the host of node rank 0"),
        (b"tprthost" + (9).to_bytes(4, "little") + bytes(32), "it speaks version 9 of the rendezvous"),
        (pack_greeting(bytes(32)), "the secret of this host is not that of node rank 0"),
    ],
)
def test_a_host_does_not_follow_somebody_else(greeting: bytes, words: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:
        somebody = pool.submit(greet_as(greeting), listener)
        with pytest.raises(ConfigError) as refused:
            come(listener.getsockname()[1], card())
        assert words in str(refused.value)
        somebody.result(WAIT_S)
