"""The client lane: everything arrives, and whoever is gone, late or in the way is told or reported."""

from __future__ import annotations

import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.transport.groups import later
from tprt.errors import PeerLostError, TransportError
from tprt.transport.zmq_socket import RequestClient, RequestServer

WAIT_S = 10.0


@pytest.fixture(params=["ipc", "tcp"])
def server(request: pytest.FixtureRequest, run_dir: Path) -> Iterator[RequestServer]:
    address = f"ipc://{run_dir}/requests.sock" if request.param == "ipc" else "tcp://127.0.0.1:*"
    server = RequestServer.bind(address)
    yield server
    server.close()


@pytest.fixture
def connect(server: RequestServer) -> Iterator[Callable[[], RequestClient]]:
    made: list[RequestClient] = []

    def make() -> RequestClient:
        made.append(RequestClient.connect(server.address))
        return made[-1]

    yield make
    for client in made:
        client.close()


Connect = Callable[[], RequestClient]


def meet(server: RequestServer, client: RequestClient, name: bytes = b"hello") -> bytes:
    """Let the client say hello; return the id that the server knows it by."""
    client.send([name])
    received = server.receive(WAIT_S)
    assert received is not None
    assert received[1] == name
    return received[0]


def send_many(
    server: RequestServer, client_id: bytes, payload: bytes, pause_s: float = 0.0, sent: list[int] | None = None
) -> None:
    for number in range(1000):
        server.send(client_id, [payload])
        if sent is not None:
            sent.append(number)
        time.sleep(pause_s)


def test_parts_arrive_as_one_message_in_both_directions(server: RequestServer, connect: Connect) -> None:
    client = connect()
    client.send([b"ab", memoryview(b"cd"), b""])
    received = server.receive(WAIT_S)
    assert received is not None
    client_id, payload = received
    assert payload == b"abcd"
    server.send(client_id, [b"ef", bytearray(b"gh")])
    assert client.receive(WAIT_S) == b"efgh"


def test_messages_of_many_clients_keep_their_order(server: RequestServer, connect: Connect) -> None:
    clients = [connect() for _ in range(3)]
    ids = {meet(server, client, b"%d" % i): i for i, client in enumerate(clients)}
    for number in range(50):
        for client in clients:
            client.send([b"%d" % number])
    got: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(150):
        received = server.receive(WAIT_S)
        assert received is not None
        got[ids[received[0]]].append(int(received[1]))
    assert got == {i: list(range(50)) for i in range(3)}


def test_receive_returns_none_when_nothing_comes_in_time(server: RequestServer, connect: Connect) -> None:
    client = connect()
    begin_s = time.monotonic()
    assert server.receive(0.05) is None
    assert client.receive(0.05) is None
    assert time.monotonic() - begin_s >= 0.1
    assert server.receive(0.0) is None
    assert client.receive(0.0) is None


def test_a_client_may_come_before_the_server(run_dir: Path) -> None:
    address = f"ipc://{run_dir}/late.sock"
    client = RequestClient.connect(address)
    client.send([b"early"])
    assert client.receive(0.05) is None
    server = RequestServer.bind(address)
    received = server.receive(WAIT_S)
    assert received is not None
    assert received[1] == b"early"
    client.close()
    server.close()


def test_a_vanished_client_is_an_error_of_its_own_send_only(server: RequestServer, connect: Connect) -> None:
    gone, stays = connect(), connect()
    gone_id, stays_id = meet(server, gone), meet(server, stays)
    gone.close()
    with pytest.raises(PeerLostError, match=gone_id.hex()):
        send_many(server, gone_id, b"x", pause_s=0.01)
    server.send(stays_id, [b"y"])
    assert stays.receive(WAIT_S) == b"y"


def test_a_client_sees_the_end_of_the_server_at_once_and_still_reads_what_had_come(
    server: RequestServer, connect: Connect
) -> None:
    client = connect()
    client_id = meet(server, client)
    for number in range(20):
        server.send(client_id, [b"%d" % number])
    with later(0.1, server.close):
        assert [client.receive(WAIT_S) for _ in range(20)] == [b"%d" % number for number in range(20)]
        begin_s = time.monotonic()
        assert client.receive(WAIT_S) is None
        assert time.monotonic() - begin_s < WAIT_S / 2
    assert client.loss is not None
    assert server.address in client.loss


def test_a_lost_lane_does_not_let_its_caller_spin(server: RequestServer, connect: Connect) -> None:
    client = connect()
    meet(server, client)
    server.close()
    assert client.receive(WAIT_S) is None
    begin_s = time.monotonic()
    assert client.receive(0.05) is None
    assert time.monotonic() - begin_s >= 0.05
    client.send([b"to nobody"])


def test_a_client_that_does_not_read_is_given_up_and_told(run_dir: Path) -> None:
    server = RequestServer.bind(f"ipc://{run_dir}/requests.sock", max_unread=4)
    client = RequestClient.connect(server.address)
    client_id = meet(server, client)
    sent: list[int] = []
    with pytest.raises(PeerLostError, match="given up"):
        send_many(server, client_id, bytes(100_000), sent=sent)
    with pytest.raises(PeerLostError, match="given up"):
        server.send(client_id, [b"later"])
    read = 0
    while client.loss is None:
        read += client.receive(0.01) is not None
        assert server.receive(0.0) is None
    assert read == len(sent) >= 4
    assert "given this client up" in client.loss
    client.close()
    server.close()


def test_the_descriptor_wakes_a_poller_after_an_empty_receive(server: RequestServer, connect: Connect) -> None:
    client = connect()
    meet(server, client)
    poller = select.poll()
    poller.register(server.fileno(), select.POLLIN)
    for number in range(100):
        while server.receive(0.0) is not None:
            pass
        payload = None
        with later(0.002 if number % 2 else 0.0, client.send, [b"%d" % number]):
            while payload is None:
                assert poller.poll(WAIT_S * 1000)
                payload = server.receive(0.0)
        assert payload[1] == b"%d" % number


@pytest.mark.parametrize(
    "address", ["ipc:///no/such/folder/x.sock", f"ipc:///tmp/{'x' * 120}", "tcp://nowhere"]
)
def test_an_address_that_cannot_be_used_is_named(address: str, no_descriptor_is_left: None) -> None:
    with pytest.raises(TransportError, match="cannot listen on"):
        RequestServer.bind(address)


def test_a_client_of_a_wrong_address_is_told(no_descriptor_is_left: None) -> None:
    with pytest.raises(TransportError, match="cannot connect to carrier-pigeon"):
        RequestClient.connect("carrier-pigeon")


def test_close_is_idempotent_and_flushes(run_dir: Path) -> None:
    server = RequestServer.bind(f"ipc://{run_dir}/requests.sock")
    client = RequestClient.connect(server.address)
    meet(server, client)
    client.send([b"last words"])
    client.close()
    client.close()
    received = server.receive(WAIT_S)
    assert received is not None
    assert received[1] == b"last words"
    server.close()
    server.close()


@pytest.mark.timeout(20)
def test_a_client_closes_though_nobody_is_left_for_what_it_has_sent(
    server: RequestServer, connect: Connect
) -> None:
    client = connect()
    meet(server, client)
    server.close()
    while client.loss is None:
        client.send([bytes(1000)])
        client.receive(0.01)
    client.close()
    assert client.loss is not None


def test_a_client_that_never_waits_sees_the_end_of_the_server(server: RequestServer, connect: Connect) -> None:
    client = connect()
    client_id = meet(server, client)
    server.send(client_id, [b"last words"])
    server.close()
    got, deadline_s = [], time.monotonic() + WAIT_S
    while client.loss is None:
        got.append(client.receive(0.0))
        assert time.monotonic() < deadline_s
    got += [client.receive(0.0), client.receive(0.0)]
    assert [message for message in got if message is not None] == [b"last words"]
    assert "has closed the connection" in client.loss


def test_the_descriptors_of_a_client_signal_messages_and_the_end_of_the_server(
    server: RequestServer, connect: Connect
) -> None:
    client = connect()
    client_id = meet(server, client)
    poller = select.poll()
    for fd in client.filenos():
        poller.register(fd, select.POLLIN)

    def wait() -> bytes | None:
        # A signal may be of the connection's own making, with nothing to receive after it.
        deadline_s = time.monotonic() + WAIT_S
        while (message := client.receive(0.0)) is None and client.loss is None:
            assert poller.poll((deadline_s - time.monotonic()) * 1000)
        return message

    with later(0.05, server.send, client_id, [b"one"]):
        assert wait() == b"one"
    with later(0.05, server.close):
        assert wait() is None
    assert client.loss is not None
