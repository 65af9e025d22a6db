"""A control lane: whole messages in order, and no end that waits for ever."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator

import pytest

from tprt.errors import PeerLostError, TransportError, TransportTimeoutError
from tprt.transport.control_lane import MAX_CONTROL_BYTES, ControlReceiver, ControlSender

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends(no_descriptor_is_left: None) -> Iterator[Ends]:
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield ends
    for end in ends:
        end.close()


def test_messages_keep_their_order_and_their_boundaries(ends: Ends) -> None:
    sender, receiver = ControlSender(ends[0], "hub"), ControlReceiver(ends[1])
    messages = [b"one", b"", b"x" * 70_000, b"\0", b"last"]
    for message in messages:
        sender.send(message, 1.0)
    assert [receiver.try_receive() for _ in messages] == messages
    assert receiver.try_receive() is None
    assert not receiver.is_lost


def test_a_traceback_of_200_kib_does_not_wait_for_the_reader(ends: Ends) -> None:
    sender, receiver = ControlSender(ends[0], "hub"), ControlReceiver(ends[1])
    sender.send(b"t" * 200 * 1024, 0.0)
    assert receiver.try_receive() == b"t" * 200 * 1024


def test_the_end_of_the_peer_comes_after_its_last_message(ends: Ends) -> None:
    sender, receiver = ControlSender(ends[0], "hub"), ControlReceiver(ends[1])
    sender.send(b"last", 1.0)
    ends[0].close()
    assert receiver.try_receive() == b"last"
    assert receiver.try_receive() is None
    assert receiver.is_lost
    assert receiver.try_receive() is None


def test_a_peer_that_does_not_read_is_a_timeout_and_the_next_message_is_whole(ends: Ends) -> None:
    sender, receiver = ControlSender(ends[0], "hub"), ControlReceiver(ends[1])
    begin_s = time.monotonic()
    with pytest.raises(TransportTimeoutError, match=r"hub has not read its control lane for 0\.1 s"):
        sender.send(bytes(4 * 1024 * 1024), 0.1)
    assert 0.1 <= time.monotonic() - begin_s < 1.0
    assert receiver.try_receive() is None
    sender.send(b"short", 1.0)
    assert receiver.try_receive() == b"short"


def test_sending_to_a_peer_that_is_gone_is_an_error(ends: Ends) -> None:
    sender = ControlSender(ends[0], "hub")
    ends[1].close()
    with pytest.raises(PeerLostError, match="hub is gone"):
        sender.send(b"news", 1.0)


def test_a_message_beyond_all_measure_is_refused_at_both_ends(ends: Ends) -> None:
    sender, receiver = ControlSender(ends[0], "hub"), ControlReceiver(ends[1])
    with pytest.raises(TransportError, match=f"expected at most {MAX_CONTROL_BYTES}"):
        sender.send(bytes(MAX_CONTROL_BYTES + 1), 1.0)
    while not receiver.is_lost:
        ends[0].send(b"\0" + bytes(32_000))
        assert receiver.try_receive() is None
