"""The lane between supervisor and coordinator carries requests one way and ends of groups the other."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from launch.group_lane import GroupLane
from tests.unit.coordinator.engine_of_threads import DEADLINE_S
from tprt.coordinator.group_keeper import SupervisorLane
from tprt.errors import TransportError
from tprt.messages import EndGroup, GroupEnded, GroupReady, StartGroup
from tprt.transport.channel import WorkerHub

LONG = "a traceback\n" * 10_000
ENDED = GroupEnded(3, LONG, 1, False, True)


def no_hub(epoch: int) -> WorkerHub:
    raise AssertionError(epoch)


@pytest.fixture
def lanes() -> Iterator[tuple[GroupLane, SupervisorLane]]:
    supervisors = GroupLane()
    inherited = socket.socket(fileno=os.dup(supervisors.coordinators_fd))
    supervisors.close_coordinators_end()
    coordinators = SupervisorLane(inherited, no_hub, lambda epoch: None)
    yield supervisors, coordinators
    supervisors.close()
    coordinators.close()


def test_what_the_coordinator_asks_for_comes_in_order(lanes: tuple[GroupLane, SupervisorLane]) -> None:
    supervisors, coordinators = lanes
    assert list(supervisors.requests()) == []
    coordinators.is_ready(0)
    coordinators.end(0, LONG)
    coordinators.start(1)
    assert list(supervisors.requests()) == [GroupReady(0), EndGroup(0, LONG), StartGroup(1)]


def test_the_end_of_a_group_comes_with_its_cause(lanes: tuple[GroupLane, SupervisorLane]) -> None:
    supervisors, coordinators = lanes
    assert coordinators.receive(0.0) is None
    supervisors.send(ENDED)
    assert coordinators.receive(DEADLINE_S) == ENDED


def test_the_deadlines_of_what_is_sent_do_not_hold_for_what_is_received(
    lanes: tuple[GroupLane, SupervisorLane],
) -> None:
    supervisors, coordinators = lanes
    coordinators.start(1)
    supervisors.send(ENDED)
    assert list(supervisors.requests()) == [StartGroup(1)]
    assert coordinators.receive(0.0) == ENDED
    assert list(supervisors.requests()) == []
    assert coordinators.receive(0.0) is None
    assert supervisors.fileno() >= 0, "that nothing came in time was not taken for a loss"


def test_the_loss_of_either_end_is_seen_by_the_other(lanes: tuple[GroupLane, SupervisorLane]) -> None:
    supervisors, coordinators = lanes
    coordinators.start(7)
    coordinators.close()
    assert list(supervisors.requests()) == [StartGroup(7)], "what was said before is heard"
    assert supervisors.fileno() == -1
    supervisors.send(ENDED)


def test_a_supervisor_that_is_gone_is_an_error(lanes: tuple[GroupLane, SupervisorLane]) -> None:
    supervisors, coordinators = lanes
    supervisors.send(ENDED)
    supervisors.close()
    assert coordinators.receive(DEADLINE_S) == ENDED
    with pytest.raises(TransportError, match="the supervisor is gone"):
        coordinators.receive(DEADLINE_S)
