"""What hub and links promise, held by each kind: shared memory, several hosts, and the twin in one process."""

from __future__ import annotations

import select
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.transport.groups import later
from tprt.errors import PeerLostError, TransportTimeoutError
from tprt.transport.channel import ControlEvent, Writer

WAIT_S = 10.0


def test_every_rank_gets_every_step_in_order(make_group: Callable[[int], Any]) -> None:
    group = make_group(3)
    for first in range(0, 40, 8):
        for number in range(first, first + 8):
            group.hub.steps.send([b"step ", memoryview(b"%d" % number), b""], WAIT_S)
        for link in group.links:
            got = [link.steps.receive(WAIT_S) for _ in range(8)]
            assert got == [b"step %d" % number for number in range(first, first + 8)]


def test_only_rank_0_answers_and_its_outputs_keep_their_order(make_group: Callable[[int], Any]) -> None:
    group = make_group(2)
    assert group.links[1].outputs is None
    for number in range(30):
        group.links[0].outputs.send([b"%d" % number], WAIT_S)
        assert group.hub.receive_output(WAIT_S) == b"%d" % number


def test_an_empty_message_is_a_message(make_group: Callable[[int], Any]) -> None:
    group = make_group(1)
    group.hub.steps.send([], WAIT_S)
    group.links[0].outputs.send([b""], WAIT_S)
    group.links[0].send_control(b"", WAIT_S)
    assert group.links[0].steps.receive(WAIT_S) == b""
    assert group.hub.receive_output(WAIT_S) == b""
    assert group.hub.receive_output(WAIT_S) == ControlEvent(0, b"")


def test_an_output_that_is_there_comes_before_a_control_event(make_group: Callable[[int], Any]) -> None:
    group = make_group(2)
    group.links[0].outputs.send([b"output"], WAIT_S)
    group.links[1].send_control(b"failed", WAIT_S)
    assert group.hub.receive_output(WAIT_S) == b"output"
    assert group.hub.receive_output(WAIT_S) == ControlEvent(1, b"failed")


def test_every_rank_can_speak_on_its_control_lane(make_group: Callable[[int], Any]) -> None:
    group = make_group(3)
    for rank in (2, 0, 1, 2):
        group.links[rank].send_control(b"from %d" % rank, WAIT_S)
    events = [group.hub.receive_control(WAIT_S) for _ in range(4)]
    assert sorted(event.rank for event in events) == [0, 1, 2, 2]
    assert all(event.payload == b"from %d" % event.rank for event in events)
    assert group.hub.receive_control(0.0) is None


@pytest.mark.parametrize("num_bytes", [31_999, 32_000, 32_001, 200 * 1024, 3 * 1024 * 1024])
def test_a_large_control_message_arrives_whole(make_group: Callable[[int], Any], num_bytes: int) -> None:
    group = make_group(2)
    payload = bytes(range(256)) * (num_bytes // 256) + b"x" * (num_bytes % 256)
    sender = threading.Thread(target=group.links[1].send_control, args=(payload, WAIT_S))
    sender.start()
    event = group.hub.receive_control(WAIT_S)
    sender.join()
    assert event == ControlEvent(1, payload)


def test_a_closed_link_is_told_once_after_what_it_said(make_group: Callable[[int], Any]) -> None:
    group = make_group(2)
    group.links[1].send_control(b"last words", WAIT_S)
    group.links[1].close()
    assert group.hub.receive_control(WAIT_S) == ControlEvent(1, b"last words")
    assert group.hub.receive_output(WAIT_S) == ControlEvent(1, None)
    assert group.hub.receive_control(0.0) is None
    with pytest.raises(PeerLostError, match="rank 1"):
        group.hub.steps.send([b"step"], WAIT_S)


def test_a_link_that_closes_wakes_a_hub_that_waits_for_an_output(make_group: Callable[[int], Any]) -> None:
    group = make_group(2)
    begin_s = time.monotonic()
    with later(0.1, group.links[0].close):
        assert group.hub.receive_output(WAIT_S) == ControlEvent(0, None)
    assert time.monotonic() - begin_s < WAIT_S / 2


def test_a_link_that_closes_wakes_a_hub_that_waits_for_room(make_group: Callable[[int], Any]) -> None:
    group = make_group(2)
    for _ in range(8):
        group.hub.steps.send([b"step"], WAIT_S)
    with later(0.1, group.links[1].close), pytest.raises(PeerLostError, match="rank 1"):
        group.hub.steps.send([b"step"], WAIT_S)


def test_a_hub_that_closes_wakes_a_rank_after_it_has_read_everything(make_group: Callable[[int], Any]) -> None:
    group = make_group(2)
    group.hub.steps.send([b"one"], WAIT_S)
    group.hub.steps.send([b"two"], WAIT_S)
    begin_s = time.monotonic()
    with later(0.1, group.hub.close):
        assert group.links[1].steps.receive(WAIT_S) == b"one"
        assert group.links[1].steps.receive(WAIT_S) == b"two"
        with pytest.raises(PeerLostError, match=r"the coordinator.* is gone"):
            group.links[1].steps.receive(WAIT_S)
    assert time.monotonic() - begin_s < WAIT_S / 2
    with pytest.raises(PeerLostError, match=r"the coordinator.* is gone"):
        group.links[1].steps.receive(WAIT_S)


def send_more_than_fits(writer: Writer) -> None:
    for _ in range(9):
        writer.send([b"output"], WAIT_S)


def test_a_rank_cannot_send_to_a_hub_that_is_closed(make_group: Callable[[int], Any]) -> None:
    group = make_group(1)
    group.hub.close()
    with pytest.raises(PeerLostError, match="coordinator"):
        group.links[0].send_control(b"news", WAIT_S)
    with pytest.raises(PeerLostError, match="coordinator"):
        send_more_than_fits(group.links[0].outputs)


def test_a_full_lane_names_those_who_are_behind_and_sends_nothing(make_group: Callable[[int], Any]) -> None:
    group = make_group(3)
    for number in range(8):
        group.hub.steps.send([b"%d" % number], WAIT_S)
        assert group.links[1].steps.receive(WAIT_S) == b"%d" % number
    assert group.links[2].steps.receive(WAIT_S) == b"0"
    with pytest.raises(TransportTimeoutError, match=r"no room for message 9 after 0\.1 s") as caught:
        group.hub.steps.send([b"8"], 0.1)
    assert "rank 0" in str(caught.value)
    assert "has read up to message 0 of 8" in str(caught.value)
    assert "rank 1" not in str(caught.value)
    assert "rank 2" not in str(caught.value)
    assert group.links[1].steps.try_receive() is None
    assert group.links[0].steps.receive(WAIT_S) == b"0"
    group.hub.steps.send([b"8"], WAIT_S)
    assert group.links[1].steps.receive(WAIT_S) == b"8"


def test_room_that_is_made_wakes_the_sender(make_group: Callable[[int], Any]) -> None:
    group = make_group(2)
    for _ in range(8):
        group.hub.steps.send([b"step"], WAIT_S)
        assert group.links[0].steps.receive(WAIT_S) == b"step"
    begin_s = time.monotonic()
    with later(0.1, group.links[1].steps.receive, WAIT_S):
        group.hub.steps.send([b"step"], WAIT_S)
    assert time.monotonic() - begin_s < WAIT_S / 2


@pytest.mark.parametrize("timeout_s", [0.0, 0.05])
def test_nothing_in_time_is_a_timeout(make_group: Callable[[int], Any], timeout_s: float) -> None:
    group = make_group(2)
    begin_s = time.monotonic()
    with pytest.raises(TransportTimeoutError, match=r"the coordinator.* has sent nothing"):
        group.links[0].steps.receive(timeout_s)
    assert group.hub.receive_control(timeout_s) is None
    with pytest.raises(TransportTimeoutError, match="rank 0 has not answered"):
        group.hub.receive_output(timeout_s)
    assert 3 * timeout_s <= time.monotonic() - begin_s < 3 * timeout_s + 1.0


def test_an_answer_that_does_not_come_names_the_ranks_that_have_not_read(
    make_group: Callable[[int], Any],
) -> None:
    group = make_group(3)
    group.hub.steps.send([b"step"], WAIT_S)
    group.links[0].steps.receive(WAIT_S)
    group.links[2].steps.receive(WAIT_S)
    with pytest.raises(TransportTimeoutError, match=r"rank 1 .*has read up to message 0 of 1") as caught:
        group.hub.receive_output(0.05)
    assert "rank 2" not in str(caught.value)


def test_the_descriptor_of_steps_wakes_a_poller(make_group: Callable[[int], Any]) -> None:
    group = make_group(1)
    steps = group.links[0].steps
    poller = select.poll()
    poller.register(steps.fileno(), select.POLLIN)
    for number in range(20):
        assert steps.try_receive() is None
        assert poller.poll(0) == []
        with later(0.001, group.hub.steps.send, [b"%d" % number], WAIT_S):
            assert poller.poll(WAIT_S * 1000)
        assert steps.receive(WAIT_S) == b"%d" % number


def test_the_descriptors_of_a_hub_are_readable_while_there_are_events(make_group: Callable[[int], Any]) -> None:
    group = make_group(2)
    poller = select.poll()
    for fd in group.hub.filenos():
        poller.register(fd, select.POLLIN)
    assert poller.poll(0) == []
    for _ in range(3):
        group.links[1].send_control(b"news", WAIT_S)
    group.links[1].close()
    events = []
    while poller.poll(100):
        if (event := group.hub.receive_control(0.0)) is not None:
            events.append(event)
    assert events == [ControlEvent(1, b"news")] * 3 + [ControlEvent(1, None)]


def test_threads_of_one_rank_share_its_control_lane(make_group: Callable[[int], Any]) -> None:
    group = make_group(1)
    payloads = [bytes([number]) * 100_000 for number in range(4)]
    threads = [
        threading.Thread(target=group.links[0].send_control, args=(payload, WAIT_S)) for payload in payloads
    ]
    for thread in threads:
        thread.start()
    got = [group.hub.receive_control(WAIT_S).payload for _ in payloads]
    for thread in threads:
        thread.join()
    assert sorted(got) == payloads
