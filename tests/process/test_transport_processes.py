"""Hub and links between real processes: nothing lost, nobody waited for in silence, no core kept busy."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tprt.errors import PeerLostError, TransportError, TransportTimeoutError
from tprt.transport.channel import ControlEvent
from tprt.transport.hub import ShmWorkerHub
from tprt.transport.link import ShmWorkerLink
from tprt.transport.shm_ring import RingGeometry

ROOT = Path(__file__).parents[2]
WAIT_S = 20.0
AT_ONCE_S = 1.0
SMALL = RingGeometry(num_slots=4, slot_bytes=2048)


def message(number: int) -> bytes:
    """Return message `number` of a run: its bytes show which one it is; one in 25 outgrows a slot."""
    dice = random.Random(number)
    size = dice.randrange(2049, 60_000) if dice.random() < 0.04 else dice.randrange(8, 2049)
    return number.to_bytes(8, "little") + dice.randbytes(size - 8)


def list_descriptors() -> list[str]:
    """Return what this process's descriptors are, but for that of the listing itself."""
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sorted(os.readlink(path) for path in paths if os.path.exists(path))


# What a child does.


def play_reader(path: str, rank: int) -> None:
    """Read every message, stalling now and then, and report whether they are the ones that were sent."""
    before = list_descriptors()
    link = ShmWorkerLink.connect(path, epoch=0, rank=rank, timeout_s=WAIT_S)
    dice = random.Random(rank)
    number = 0
    while got := link.steps.receive(WAIT_S):
        if got != message(number):
            say(wrong=number, got=int.from_bytes(got[:8], "little"))
            return
        number += 1
        if dice.random() < 0.02:
            time.sleep(dice.random() * 0.01)
        elif dice.random() < 0.3:
            time.sleep(dice.random() * 1e-4)
        if link.outputs is not None:
            link.outputs.send([got], WAIT_S)
    link.close()
    say(read=number, left=[path for path in list_descriptors() if path not in before])


def play_waiter(path: str, rank: int) -> None:
    """Wait for steps until an error comes, and report it."""
    link = ShmWorkerLink.connect(path, epoch=0, rank=rank, timeout_s=WAIT_S)
    say(connected=rank)
    read = 0
    try:
        while True:
            link.steps.receive(WAIT_S)
            read += 1
    except TransportError as error:
        say(error=type(error).__name__, message=str(error), time_s=time.monotonic(), read=read)


def play_idler(path: str, rank: int) -> None:
    """Wait for a step that comes late, and report the share of a core that the wait took."""
    link = ShmWorkerLink.connect(path, epoch=0, rank=rank, timeout_s=WAIT_S)
    say(connected=rank)
    begin_s, begin_cpu_s = time.monotonic(), time.process_time()
    link.steps.receive(WAIT_S)
    say(share=(time.process_time() - begin_cpu_s) / (time.monotonic() - begin_s))


def play_hub(path: str, world_size: int) -> None:
    """Be the coordinator of a group until killed."""
    hub = ShmWorkerHub.listen(path, epoch=0, world_size=world_size)
    hub.accept_all(WAIT_S)
    hub.steps.send([b"step"], WAIT_S)
    say(accepted=world_size)
    sys.stdin.read()


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


# The tests.


class Child:
    """A process that plays a role."""

    def __init__(self, role: str, path: str, number: int) -> None:
        command = [sys.executable, __file__, role, path, str(number)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"process {self.pid} ended with {self.process.wait()}"
        said: dict[str, Any] = json.loads(line)
        return said


class Stage:
    """A folder, a hub in this process, and children; all gone at the end."""

    def __init__(self, folder: str) -> None:
        self.path = f"{folder}/hub"
        self.children: list[Child] = []
        self.hubs: list[ShmWorkerHub] = []

    def start(self, role: str, numbers: range) -> list[Child]:
        started = [Child(role, self.path, number) for number in numbers]
        self.children += started
        return started

    def listen(self, world_size: int, geometry: RingGeometry = SMALL) -> ShmWorkerHub:
        hub = ShmWorkerHub.listen(
            self.path, epoch=0, world_size=world_size, geometry=geometry, outputs_geometry=SMALL
        )
        self.hubs.append(hub)
        return hub

    def meet(
        self, role: str, world_size: int, geometry: RingGeometry = SMALL
    ) -> tuple[ShmWorkerHub, list[Child]]:
        """Return a hub and the children that are connected to it as its ranks."""
        hub = self.listen(world_size, geometry)
        children = self.start(role, range(world_size))
        hub.accept_all(WAIT_S)
        if role != "reader":
            for rank, child in enumerate(children):
                assert child.hear() == {"connected": rank}
        return hub, children


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


@pytest.fixture
def stage() -> Iterator[Stage]:
    before = list_descriptors()
    with tempfile.TemporaryDirectory(prefix="tprt-test-") as folder:
        stage = Stage(folder)
        yield stage
        for child in stage.children:
            with child.process as process:
                process.kill()
        for hub in stage.hubs:
            hub.close()
    assert list_descriptors() == before


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_readers_that_stall_at_random_get_every_message_once_and_in_order(
    stage: Stage, world_size: int
) -> None:
    num_messages = 600
    assert sum(len(message(number)) > SMALL.slot_bytes for number in range(num_messages)) > 10
    hub, children = stage.meet("reader", world_size)
    answered = 0

    def take_answers(timeout_s: float) -> int:
        nonlocal answered
        while answered < num_messages:
            try:
                output = hub.receive_output(timeout_s)
            except TransportTimeoutError:
                break
            assert output == message(answered)
            answered += 1
        return answered

    for number in range(num_messages):
        hub.steps.send([message(number)], WAIT_S)
        take_answers(0.0)
    assert take_answers(WAIT_S) == num_messages
    hub.steps.send([], WAIT_S)
    for child in children:
        assert child.hear() == {"read": num_messages, "left": []}
        assert child.process.wait(WAIT_S) == 0


def test_a_stopped_reader_is_named_with_the_last_message_that_it_read(stage: Stage) -> None:
    hub, children = stage.meet("waiter", 3)
    for number in range(2):
        hub.steps.send([b"%d" % number], WAIT_S)
    wait_until(lambda: not hub.steps.describe_behind())
    children[1].process.send_signal(signal.SIGSTOP)
    for number in range(4):
        hub.steps.send([b"%d" % number], WAIT_S)
    begin_s = time.monotonic()
    with pytest.raises(TransportTimeoutError, match=r"no room for message 7 after 0\.5 s") as caught:
        hub.steps.send([b"one too many"], 0.5)
    assert 0.5 <= time.monotonic() - begin_s < 0.5 + AT_ONCE_S
    said = re.search(
        r"rank (\d) \(process (\d+)\) has read up to message (\d) of 6, last active (.*) s ago",
        str(caught.value),
    )
    assert said is not None
    assert said.group(1, 2, 3) == ("1", str(children[1].pid), "2")
    assert 0.4 < float(said.group(4)) < WAIT_S
    assert "rank 0" not in str(caught.value)
    children[1].process.send_signal(signal.SIGCONT)
    hub.steps.send([b"fits now"], WAIT_S)


def test_a_reader_that_dies_is_reported_at_once(stage: Stage) -> None:
    hub, children = stage.meet("waiter", 3)
    children[2].process.kill()
    begin_s = time.monotonic()
    assert hub.receive_output(WAIT_S) == ControlEvent(2, None)
    assert time.monotonic() - begin_s < AT_ONCE_S
    with pytest.raises(PeerLostError, match=rf"rank 2 is gone: \(process {children[2].pid}\)"):
        hub.steps.send([b"step"], WAIT_S)


def test_a_reader_that_dies_while_the_writer_waits_for_it_ends_the_wait_at_once(stage: Stage) -> None:
    hub, children = stage.meet("waiter", 2)
    children[1].process.send_signal(signal.SIGSTOP)
    for _ in range(4):
        hub.steps.send([b"step"], WAIT_S)
    threading.Timer(0.2, children[1].process.kill).start()
    begin_s = time.monotonic()
    with pytest.raises(PeerLostError, match="rank 1 is gone"):
        hub.steps.send([b"step"], WAIT_S)
    assert time.monotonic() - begin_s < 0.2 + AT_ONCE_S
    assert hub.receive_control(WAIT_S) == ControlEvent(1, None)


def test_a_rank_that_dies_before_all_have_come_ends_the_wait_at_once(stage: Stage) -> None:
    hub = stage.listen(2)
    (child,) = stage.start("waiter", range(1, 2))
    while child.pid not in hub.pids.values():
        assert hub.receive_control(0.05) is None
    assert child.hear() == {"connected": 1}
    threading.Timer(0.2, child.process.kill).start()
    begin_s = time.monotonic()
    with pytest.raises(PeerLostError, match=rf"rank 1 \(process {child.pid}\) went away before \[0\]"):
        hub.accept_all(WAIT_S)
    assert time.monotonic() - begin_s < 0.2 + AT_ONCE_S


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_coordinator_that_dies_is_seen_at_once_by_every_waiting_reader(stage: Stage, how: int) -> None:
    (coordinator,) = stage.start("hub", range(3, 4))
    readers = stage.start("waiter", range(3))
    for rank, reader in enumerate(readers):
        assert reader.hear() == {"connected": rank}
    assert coordinator.hear() == {"accepted": 3}
    time.sleep(0.1)
    begin_s = time.monotonic()
    coordinator.process.send_signal(how)
    for reader in readers:
        said = reader.hear()
        assert (said["error"], said["read"]) == ("PeerLostError", 1)
        assert said["message"] == "the coordinator is gone; the last message read was 1"
        assert 0.0 <= said["time_s"] - begin_s < AT_ONCE_S


def test_an_idle_reader_takes_less_than_a_hundredth_of_a_core(stage: Stage) -> None:
    hub, children = stage.meet("idler", 2)
    time.sleep(1.0)
    hub.steps.send([b"step"], WAIT_S)
    for child in children:
        assert child.hear()["share"] < 0.01


if __name__ == "__main__":
    roles = {"reader": play_reader, "waiter": play_waiter, "idler": play_idler, "hub": play_hub}
    roles[sys.argv[1]](sys.argv[2], int(sys.argv[3]))
