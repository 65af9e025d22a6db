"""Steps to other hosts over TCP: in order, counted, and no rank that is late or gone goes unnamed."""

from __future__ import annotations

import logging
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.unit.transport.groups import later
from tprt.errors import PeerLostError, SequenceGapError, TransportError, TransportTimeoutError
from tprt.transport import remote_door
from tprt.transport.channel import ControlEvent
from tprt.transport.remote_reader import RemoteStepReader
from tprt.transport.remote_wire import FRAME, HELLO, pack_answer, pack_greeting, pack_hello
from tprt.transport.remote_writer import RemoteStepWriter

WAIT_S = 10.0
TOKEN = b"of this deployment"
RANKS = [2, 3, 5]

Lanes = tuple[RemoteStepWriter, list[RemoteStepReader]]


@pytest.fixture
def writer(no_descriptor_is_left: None) -> Iterator[RemoteStepWriter]:
    writer = RemoteStepWriter.listen("tcp://127.0.0.1:0", epoch=4, ranks=RANKS, token=TOKEN)
    yield writer
    writer.close()
    writer.close()


@pytest.fixture
def pool(writer: RemoteStepWriter) -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def lanes(writer: RemoteStepWriter, pool: ThreadPoolExecutor) -> Iterator[Lanes]:
    joining = [pool.submit(connect, writer, rank) for rank in RANKS]
    writer.accept_all(WAIT_S)
    readers = [future.result(WAIT_S) for future in joining]
    yield writer, readers
    for reader in readers:
        reader.close()
        reader.close()


def connect(
    writer: RemoteStepWriter, rank: int, epoch: int = 4, token: bytes = TOKEN, timeout_s: float = WAIT_S
) -> RemoteStepReader:
    return RemoteStepReader.connect(writer.address, epoch=epoch, rank=rank, token=token, timeout_s=timeout_s)


def test_every_rank_gets_every_step_in_order(lanes: Lanes) -> None:
    writer, readers = lanes
    sizes = random.Random(0).choices([0, 1, 100, 4096, 70_000], k=200)

    def read(reader: RemoteStepReader) -> list[bytes]:
        return [reader.receive(WAIT_S) for _ in sizes]

    with ThreadPoolExecutor(len(readers)) as pool:
        reading = [pool.submit(read, reader) for reader in readers]
        for number, size in enumerate(sizes):
            writer.send([b"%d " % number, memoryview(bytes(size))], WAIT_S)
        for future in reading:
            assert future.result(WAIT_S) == [b"%d " % number + bytes(size) for number, size in enumerate(sizes)]


def test_a_message_larger_than_any_buffer_arrives_whole(lanes: Lanes) -> None:
    writer, readers = lanes
    payload = random.Random(0).randbytes(20_000_000)
    with ThreadPoolExecutor(len(readers)) as pool:
        reading = [pool.submit(reader.receive, WAIT_S) for reader in readers]
        writer.send([payload], WAIT_S)
        for future in reading:
            assert future.result(WAIT_S) == payload


def test_a_rank_that_is_behind_is_named_with_what_it_has_read_and_nothing_is_sent(lanes: Lanes) -> None:
    writer, readers = lanes
    for number in range(8):
        writer.send([b"%d" % number], WAIT_S)
        for reader in readers[::2]:
            assert reader.receive(WAIT_S) == b"%d" % number
    assert readers[1].receive(WAIT_S) == b"0"
    writer.send([b"8"], WAIT_S)
    begin_s = time.monotonic()
    with pytest.raises(TransportTimeoutError, match=r"no room for message 10 after 0\.2 s") as caught:
        writer.send([b"9"], 0.2)
    assert time.monotonic() - begin_s >= 0.2
    assert "rank 3 at tcp://127.0.0.1:" in str(caught.value)
    assert "has read up to message 1 of 9, last heard of" in str(caught.value)
    assert "rank 2" not in str(caught.value)
    assert "rank 5" not in str(caught.value)
    with later(0.1, readers[1].receive, WAIT_S):
        writer.send([b"9"], WAIT_S)
    assert readers[0].receive(WAIT_S) == b"8"
    assert readers[0].receive(WAIT_S) == b"9"


def test_a_rank_that_does_not_take_a_message_in_time_is_named_and_ends_the_lane(lanes: Lanes) -> None:
    writer, readers = lanes
    with ThreadPoolExecutor(2) as pool:
        reading = [pool.submit(reader.receive, WAIT_S) for reader in readers[:2]]
        with pytest.raises(TransportTimeoutError, match=r"message 1 was not taken in 1 s: rank 5 at") as caught:
            writer.send([bytes(20_000_000)], 1.0)
        assert "rank 2" not in str(caught.value)
        for future in reading:
            assert len(future.result(WAIT_S)) == 20_000_000
    with pytest.raises(PeerLostError, match="message 1 was cut by a deadline"):
        writer.send([b"next"], WAIT_S)


def test_a_rank_that_goes_is_named_at_once(lanes: Lanes) -> None:
    writer, readers = lanes
    readers[1].close()
    time.sleep(0.05)
    with pytest.raises(PeerLostError, match=r"rank 3 at tcp://127.0.0.1:.* is gone"):
        writer.send([b"step"], WAIT_S)
    with pytest.raises(PeerLostError, match="rank 3"):
        writer.send([b"step"], WAIT_S)


def test_a_rank_that_goes_while_it_is_waited_for_ends_the_wait_at_once(lanes: Lanes) -> None:
    writer, readers = lanes
    for _ in range(8):
        writer.send([b"step"], WAIT_S)
    begin_s = time.monotonic()
    with later(0.1, readers[2].close), pytest.raises(PeerLostError, match="rank 5"):
        writer.send([b"step"], WAIT_S)
    assert time.monotonic() - begin_s < WAIT_S / 2


def test_a_writer_that_closes_is_seen_once_everything_is_read(lanes: Lanes) -> None:
    writer, readers = lanes
    for number in range(3):
        writer.send([b"%d" % number], WAIT_S)

    def read(reader: RemoteStepReader) -> str:
        assert [reader.receive(WAIT_S) for _ in range(3)] == [b"0", b"1", b"2"]
        with pytest.raises(PeerLostError) as caught:
            reader.receive(WAIT_S)
        return str(caught.value)

    with ThreadPoolExecutor(len(readers)) as pool:
        reading = [pool.submit(read, reader) for reader in readers]
        writer.close()
        for future in reading:
            assert "is gone" in future.result(WAIT_S)
            assert "the last message read was 3" in future.result(WAIT_S)


@pytest.mark.parametrize("timeout_s", [0.0, 0.05])
def test_nothing_in_time_is_a_timeout(lanes: Lanes, timeout_s: float) -> None:
    begin_s = time.monotonic()
    with pytest.raises(TransportTimeoutError, match=r"has sent nothing for .*; waiting for message 1"):
        lanes[1][0].receive(timeout_s)
    assert time.monotonic() - begin_s >= timeout_s


def test_the_descriptor_wakes_a_poller(lanes: Lanes) -> None:
    writer, readers = lanes
    poller = select.poll()
    poller.register(readers[0].fileno(), select.POLLIN)
    for number in range(20):
        assert readers[0].try_receive() is None
        assert poller.poll(0) == []
        writer.send([b"%d" % number], WAIT_S)
        assert poller.poll(WAIT_S * 1000)
        for reader in readers:
            assert reader.receive(WAIT_S) == b"%d" % number


def test_nothing_is_sent_before_every_rank_is_there(writer: RemoteStepWriter) -> None:
    with pytest.raises(TransportError, match=r"remote ranks \[2, 3, 5\] have not connected"):
        writer.send([b"step"], WAIT_S)


def test_missing_ranks_are_named(writer: RemoteStepWriter, pool: ThreadPoolExecutor) -> None:
    future = pool.submit(connect, writer, 3)
    with pytest.raises(TransportTimeoutError, match=r"remote ranks \[2, 5\] have not connected after 0\.2 s"):
        writer.accept_all(0.2)
    future.result(WAIT_S).close()
    with pytest.raises(PeerLostError, match="rank 3"):
        writer.accept_all(WAIT_S)


@pytest.mark.parametrize(
    ("rank", "epoch", "token", "reason"),
    [
        (3, 3, TOKEN, "refuses rank 3: it was started for epoch 3; this is epoch 4"),
        (0, 4, TOKEN, r"refuses rank 0: it calls itself rank 0; expected one of \[2, 3, 5\]"),
        (3, 4, b"another", "refuses rank 3: it does not know the token"),
    ],
)
def test_a_rank_that_does_not_belong_is_told_why(
    writer: RemoteStepWriter, pool: ThreadPoolExecutor, rank: int, epoch: int, token: bytes, reason: str
) -> None:
    future = pool.submit(connect, writer, rank, epoch, token)
    with pytest.raises(TransportTimeoutError, match="have not connected"):
        writer.accept_all(0.3)
    with pytest.raises(TransportError, match=reason):
        future.result(WAIT_S)


def test_a_rank_that_connects_twice_is_refused(writer: RemoteStepWriter, pool: ThreadPoolExecutor) -> None:
    futures = [pool.submit(connect, writer, 3) for _ in range(2)]
    with pytest.raises(TransportTimeoutError, match=r"\[2, 5\]"):
        writer.accept_all(0.3)
    errors = [future.exception(WAIT_S) for future in futures]
    assert [type(error) for error in errors if error is not None] == [TransportError]
    for future, error in zip(futures, errors, strict=True):
        if error is None:
            future.result().close()


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\nHost: " + b"x" * 90, b"tprtstep", b""])
def test_strangers_keep_nobody_out(
    writer: RemoteStepWriter, pool: ThreadPoolExecutor, said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    host, port = "127.0.0.1", int(writer.address.rpartition(":")[2])
    begin_cpu_s = time.thread_time()
    with socket.create_connection((host, port)) as stranger, socket.create_connection((host, port)) as gone:
        stranger.sendall(said)
        gone.sendall(said)
        gone.close()
        with pytest.raises(TransportTimeoutError):
            writer.accept_all(0.5)
        # Half a hello must not keep the coordinator busy.
        assert time.thread_time() - begin_cpu_s < 0.25
        joining = [pool.submit(connect, writer, rank) for rank in RANKS]
        writer.accept_all(WAIT_S)
        for future in joining:
            future.result(WAIT_S).close()
    assert "refused a connection from tcp://127.0.0.1:" in caplog.text


def test_a_rank_may_come_before_the_writer(no_descriptor_is_left: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    made: list[RemoteStepReader] = []

    def come() -> None:
        made.append(RemoteStepReader.connect(address, epoch=0, rank=1, token=TOKEN, timeout_s=WAIT_S))

    thread = threading.Thread(target=come)
    thread.start()
    time.sleep(0.1)
    writer = RemoteStepWriter.listen(address, epoch=0, ranks=[1], token=TOKEN)
    writer.accept_all(WAIT_S)
    thread.join()
    for end in (made[0], writer):
        end.close()


def test_a_rank_without_a_writer_gives_up_in_time(no_descriptor_is_left: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
    with pytest.raises(TransportTimeoutError, match=r"no coordinator listens at .* after 0\.1 s"):
        RemoteStepReader.connect(address, epoch=0, rank=1, token=TOKEN, timeout_s=0.1)


def test_a_rank_that_is_not_answered_gives_up_in_time(writer: RemoteStepWriter) -> None:
    with pytest.raises(TransportTimeoutError, match=r"did not answer in 0\.1 s"):
        connect(writer, 2, timeout_s=0.1)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (FRAME.pack(2, 0), "message 2 of 0 bytes from the coordinator .* came; expected message 1"),
        (FRAME.pack(1, 2**40), f"message 1 of {2**40} bytes"),
    ],
)
def test_a_message_that_is_missing_is_a_gap(frame: bytes, said: str, no_descriptor_is_left: None) -> None:
    ends = socket.socketpair()
    reader = RemoteStepReader(ends[0], "the coordinator at tcp://there:1")
    ends[1].sendall(frame)
    with pytest.raises(SequenceGapError, match=said):
        reader.receive(WAIT_S)
    for end in (reader, ends[1]):
        end.close()


def test_half_a_message_is_no_message(no_descriptor_is_left: None) -> None:
    ends = socket.socketpair()
    reader = RemoteStepReader(ends[0], "the coordinator")
    frame = FRAME.pack(1, 10) + b"0123456789"
    for byte in frame[:-1]:
        ends[1].sendall(bytes([byte]))
        assert reader.try_receive() is None
    ends[1].sendall(frame[-1:])
    assert reader.try_receive() == b"0123456789"
    ends[1].sendall(frame[:12])
    ends[1].close()
    with pytest.raises(PeerLostError, match="the last message read was 1"):
        reader.receive(WAIT_S)
    reader.close()


def close_before_answering(listener: socket.socket) -> None:
    listener.accept()[0].close()


def answer_by_halves(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(pack_greeting(bytes(32)))
        connection.recv(HELLO.size, socket.MSG_WAITALL)
        connection.sendall(pack_answer("not today", bytes(32), TOKEN)[:38])


def let_in_without_the_token(listener: socket.socket) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(pack_greeting(bytes(32)))
        connection.recv(HELLO.size, socket.MSG_WAITALL)
        connection.sendall(pack_answer("", bytes(32), b"guessed"))


def test_a_rank_takes_no_steps_from_a_writer_that_does_not_know_the_token(no_descriptor_is_left: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with (
            later(0.0, let_in_without_the_token, listener),
            pytest.raises(TransportError, match=r"127\.0\.0\.1.*does not know the token of this deployment"),
        ):
            RemoteStepReader.connect(address, epoch=0, rank=1, token=TOKEN, timeout_s=WAIT_S)


def test_a_hello_that_was_overheard_does_not_open_the_lane_again(writer: RemoteStepWriter) -> None:
    host, port = "127.0.0.1", int(writer.address.rpartition(":")[2])
    hellos = [pack_hello(4, 3, bytes(32), bytes(32), TOKEN)]
    with socket.create_connection((host, port)) as stranger:
        stranger.sendall(hellos[0])
        with pytest.raises(TransportTimeoutError):
            writer.accept_all(0.3)
        said = stranger.recv(4096)
    assert b"it does not know the token" in said


def next_event(writer: RemoteStepWriter) -> ControlEvent | None:
    select.select([writer.fileno()], [], [], WAIT_S)
    return writer.next_event()


def test_what_ranks_say_and_their_ends_come_out_as_events_in_order(lanes: Lanes) -> None:
    writer, readers = lanes
    assert writer.next_event() is None
    large = random.Random(0).randbytes(1_000_000)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(readers[1].send_control, large, WAIT_S)
        events = []
        while not events:
            if (event := next_event(writer)) is not None:
                events.append(event)
        sending.result(WAIT_S)
    assert events == [ControlEvent(3, large)]
    writer.send([b"step"], WAIT_S)
    readers[1].send_control(b"I fail", WAIT_S)
    assert readers[1].receive(WAIT_S) == b"step"
    readers[1].close()
    time.sleep(0.05)
    assert next_event(writer) == ControlEvent(3, b"I fail")
    assert writer.next_event() == ControlEvent(3, None)
    assert writer.next_event() is None


@pytest.mark.parametrize("behave", [close_before_answering, answer_by_halves])
def test_a_writer_that_goes_before_it_has_answered_is_a_loss(
    behave: Callable[[socket.socket], None], no_descriptor_is_left: None
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        with later(0.0, behave, listener), pytest.raises(PeerLostError, match="went away"):
            RemoteStepReader.connect(address, epoch=0, rank=1, token=TOKEN, timeout_s=WAIT_S)


@pytest.mark.parametrize(
    "address", ["127.0.0.1:80", "tcp://", "tcp://host", "tcp://host:port", "tcp://[::1", "ipc://x"]
)
def test_what_is_no_address_is_refused(address: str, no_descriptor_is_left: None) -> None:
    with pytest.raises(TransportError, match="expected tcp://host:port"):
        RemoteStepWriter.listen(address, epoch=0, ranks=[1], token=TOKEN)


def test_an_interface_of_another_host_is_refused(no_descriptor_is_left: None) -> None:
    with pytest.raises(TransportError, match=r"cannot listen on tcp://192.0.2.1:0"):
        RemoteStepWriter.listen("tcp://192.0.2.1:0", epoch=0, ranks=[1], token=TOKEN)


def test_an_acknowledgement_waits_behind_a_control_message_that_nobody_has_read_yet(lanes: Lanes) -> None:
    writer, readers = lanes
    large = bytes(4_000_000)
    with ThreadPoolExecutor(2) as pool:
        writer.send([b"step"], WAIT_S)
        sending = pool.submit(readers[1].send_control, large, WAIT_S)
        time.sleep(0.1)
        receiving = pool.submit(readers[1].receive, WAIT_S)
        time.sleep(0.1)
        assert not sending.done()
        assert not receiving.done()
        while (event := next_event(writer)) is None:
            pass
        sending.result(WAIT_S)
        assert receiving.result(WAIT_S) == b"step"
    assert event == ControlEvent(3, large)
    writer.send([b"next"], WAIT_S)
    assert readers[1].receive(WAIT_S) == b"next"


def test_many_who_say_nothing_leave_room_for_a_rank(
    writer: RemoteStepWriter, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_door, "_MAX_STRANGERS", 4)
    host, port = "127.0.0.1", int(writer.address.rpartition(":")[2])
    strangers = [socket.create_connection((host, port)) for _ in range(9)]
    with pytest.raises(TransportTimeoutError):
        writer.accept_all(0.3)
    for stranger in strangers[:5]:
        stranger.settimeout(WAIT_S)
        assert stranger.recv(4096)
        assert stranger.recv(4096) == b""
    joining = [pool.submit(connect, writer, rank) for rank in RANKS]
    writer.accept_all(WAIT_S)
    for end in (*strangers, *(future.result(WAIT_S) for future in joining)):
        end.close()
