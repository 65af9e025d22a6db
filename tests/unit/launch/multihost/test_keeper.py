"""Node rank 0 starts an epoch when all hosts are there, and ends it when one is lost or has failed."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from launch.failure import ReportedCauseError
from launch.multihost.card import HostCard
from launch.multihost.door import Door
from launch.multihost.frames import FrameLane
from launch.multihost.join import join
from launch.multihost.keeper import HostKeeper
from launch.multihost.news import BEAT, DONE, START, pack, pack_cause
from tprt.config import Config
from tprt.coordinator.cause import Cause, CauseKind
from tprt.errors import ConfigError, TransportTimeoutError
from tprt.transport.heartbeat import HeartbeatReader, HeartbeatWriter
from tprt.transport.heartbeat_file import create_heartbeats
from tprt.transport.heartbeat_relay import BeatExporter, BeatImporter

SECRET = b"of all hosts"
WAIT_S = 10.0
HEARTBEAT_S = 1.0
OWN = HostCard(rdzv_id="d", node_rank=0, instance="0", host="h", version="1", settings={}, checkpoint="")


class Kept:
    """A keeper that runs in a thread, and the hosts that come to it."""

    def __init__(self, beats: Path, listener: socket.socket, pool: ThreadPoolExecutor, join_s: float) -> None:
        hosts = {
            "nnodes": 3,
            "rdzv_endpoint": "h:29400",
            "heartbeat_timeout_s": HEARTBEAT_S,
            "join_timeout_s": join_s,
        }
        config = Config.model_validate(
            {"model": {"path": "m"}, "parallel": {"tensor_parallel_size": 3}, "hosts": hosts}
        )
        self.lanes: list[FrameLane] = []
        self._port: int = listener.getsockname()[1]
        self._door = Door(listener, OWN, 3, SECRET)
        self._beats = BeatImporter(beats)
        keeper = HostKeeper(config, self._beats, self._door)
        self.end: Future[None] = pool.submit(keeper.run, 4, {"MASTER_PORT": "7"})

    def come(self, node_rank: int, secret: bytes = SECRET) -> FrameLane:
        card = OWN.model_copy(update={"node_rank": node_rank, "instance": str(node_rank)})
        self.lanes.append(join("127.0.0.1", self._port, card, secret, WAIT_S))
        return self.lanes[-1]

    def beat_until_end(self, *lanes: FrameLane) -> None:
        """Give signs of life on `lanes` until the keeper ends."""
        while not self.end.done():
            for lane in lanes:
                lane.send(pack(BEAT, []))
            time.sleep(HEARTBEAT_S / 10)

    def close(self) -> None:
        for lane in self.lanes:
            lane.close()
        self.end.exception(WAIT_S)
        self._door.close()
        self._beats.close()


@pytest.fixture
def beats(tmp_path: Path) -> Path:
    create_heartbeats(tmp_path / "beats", 3)
    return tmp_path / "beats"


@pytest.fixture
def keep(beats: Path) -> Iterator[Callable[..., Kept]]:
    made: list[Kept] = []
    with socket.create_server(("127.0.0.1", 0)) as listener, ThreadPoolExecutor(1) as pool:

        def make(join_s: float = WAIT_S) -> Kept:
            made.append(Kept(beats, listener, pool, join_s))
            return made[-1]

        yield make
        for kept in made:
            kept.close()


def wait_for_start(lane: FrameLane) -> dict[str, object]:
    while True:
        message = lane.wait_for_message(WAIT_S)
        assert message is not None
        ((kind, content),) = json.loads(message).items()
        if kind == START:
            assert isinstance(content, dict)
            return content


def test_all_start_once_the_last_has_come_and_the_epoch_ends_when_all_are_done(
    keep: Callable[..., Kept],
) -> None:
    kept = keep()
    # Also one that has gone meanwhile, and come again.
    kept.come(1).close()
    first, second = kept.come(1), kept.come(2)
    for lane in (first, second):
        assert wait_for_start(lane) == {"epoch": 4, "env": {"MASTER_PORT": "7"}}
        lane.send(pack(DONE))
        lane.close()
    assert kept.end.result(WAIT_S) is None


def test_heartbeats_of_other_hosts_are_those_of_their_ranks(
    keep: Callable[..., Kept], beats: Path, tmp_path: Path
) -> None:
    kept = keep()
    lanes = [kept.come(node_rank) for node_rank in (1, 2)]
    create_heartbeats(tmp_path / "there", 3)
    HeartbeatWriter.open(tmp_path / "there", 2, epoch=4).close()
    exporter, reader = BeatExporter(tmp_path / "there", [2]), HeartbeatReader.open(beats)
    lanes[1].send(pack(BEAT, exporter.export()))
    deadline_s = time.monotonic() + WAIT_S
    while not reader.read()[2].pid:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    assert [beat.host for beat in reader.read()] == [0, 0, 2]
    exporter.close()
    reader.close()


def test_a_failure_is_passed_on_with_where_it_was(keep: Callable[..., Kept]) -> None:
    kept = keep()
    lanes = [kept.come(node_rank) for node_rank in (1, 2)]
    wait_for_start(lanes[0])
    lanes[1].send(pack_cause(Cause(CauseKind.OWN_ERROR, "trace\nrank 2 failed", is_input_error=True)))
    with pytest.raises(ReportedCauseError) as raised:
        kept.end.result(WAIT_S)
    text = "trace\nrank 2 failed (node rank 2, h at 127.0.0.1)"
    assert raised.value.cause == Cause(CauseKind.OWN_ERROR, text, is_input_error=True)


def test_a_host_that_is_not_heard_of_is_lost_and_others_are_not(keep: Callable[..., Kept]) -> None:
    kept = keep()
    lanes = [kept.come(node_rank) for node_rank in (1, 2)]
    wait_for_start(lanes[0])
    begin_s = time.monotonic()
    kept.beat_until_end(lanes[0])
    with pytest.raises(ReportedCauseError, match=r"node rank 2, h at 127\.0\.0\.1 is lost: nothing has"):
        kept.end.result(WAIT_S)
    assert time.monotonic() - begin_s > HEARTBEAT_S / 2


def test_a_connection_that_ends_is_the_end_of_its_host_at_once(keep: Callable[..., Kept]) -> None:
    kept = keep()
    lanes = [kept.come(node_rank) for node_rank in (1, 2)]
    wait_for_start(lanes[0])
    lanes[0].close()
    with pytest.raises(
        ReportedCauseError, match=r"node rank 1, .* is lost: the connection was closed"
    ) as raised:
        kept.end.result(WAIT_S)
    assert raised.value.cause.kind == CauseKind.SILENT_DEATH


def test_a_host_that_comes_again_has_lost_its_ranks(keep: Callable[..., Kept]) -> None:
    kept = keep()
    lanes = [kept.come(node_rank) for node_rank in (1, 2)]
    wait_for_start(lanes[0])
    kept.come(2)
    with pytest.raises(ReportedCauseError, match=r"node rank 2, .* it had lost this host, and has come again"):
        kept.end.result(WAIT_S)


def test_hosts_that_do_not_come_are_named_with_whom_was_refused(keep: Callable[..., Kept]) -> None:
    kept = keep(join_s=0.5)
    kept.come(1)
    with pytest.raises(ConfigError):
        kept.come(2, b"guessed")
    words = r"node ranks \[2\] did not come to h:29400 within 0\.5 s .*; refused: 127\.0\.0\.1: its secret"
    with pytest.raises(TransportTimeoutError, match=words):
        kept.end.result(WAIT_S)
