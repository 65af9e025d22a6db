"""The coordinator's view of the heartbeats: who is stuck, and its own line for others to see."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tprt.coordinator.group_watch import GroupWatch
from tprt.transport.coordinator_beat import read_coordinator
from tprt.transport.heartbeat import HeartbeatWriter, Phase
from tprt.transport.heartbeat_file import create_heartbeats

LONG_S = 1000.0


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "heartbeats-2"


@pytest.fixture
def watch(path: Path) -> Iterator[GroupWatch]:
    watch = GroupWatch(path, [path.parent / "stack"] * 2, 2)
    yield watch
    watch.close()


def test_before_there_is_a_file_nothing_is_known_and_nothing_goes_wrong(watch: GroupWatch) -> None:
    watch.begin_wait(0)
    watch.begin_serving()
    watch.finish_step(0)
    watch.set_requests(1, 2, 3)
    assert watch.find_stall(0.0) is None
    assert watch.find_stuck_start(0.0) is None
    assert watch.where_all_are() == ""


def test_progress_is_there_for_others_to_see(watch: GroupWatch, path: Path) -> None:
    create_heartbeats(path, 1)
    watch.begin_serving()
    watch.finish_step(5)
    watch.set_requests(1, 2, 3)
    record = read_coordinator(path)
    assert record is not None
    assert (record.epoch, record.restarts, record.serves, record.step) == (2, 2, True, 5)
    assert (record.num_running, record.num_waiting, record.oldest_waiting_ns) == (1, 2, 3)


def test_a_group_without_progress_is_stalled_once_the_time_is_over(watch: GroupWatch, path: Path) -> None:
    create_heartbeats(path, 1)
    beat = HeartbeatWriter.open(path, 0, 2)
    beat.begin_step(4, Phase.DECODE)
    watch.begin_wait(4)
    assert watch.find_stall(LONG_S) is None
    stall = watch.find_stall(0.0)
    assert stall is not None
    assert "step 4" in stall.text
    beat.close()


def test_a_start_in_which_every_rank_waits_for_another_is_stuck(watch: GroupWatch, path: Path) -> None:
    create_heartbeats(path, 2)
    ranks = [HeartbeatWriter.open(path, rank, 2) for rank in range(2)]
    watch.begin_wait(None)
    ranks[0].set_phase(Phase.KV_ALLOCATION)
    ranks[0].enter_collective(2, "min_int")
    ranks[1].set_phase(Phase.LOAD)
    assert watch.find_stuck_start(0.0) is None
    ranks[1].set_phase(Phase.IDLE)
    assert watch.find_stuck_start(LONG_S) is None
    stall = watch.find_stuck_start(0.0)
    assert stall is not None
    assert "min_int 2" in stall.text
    for rank in ranks:
        rank.close()


def test_while_ranks_start_a_process_that_is_stopped_holds_them_up(watch: GroupWatch, path: Path) -> None:
    create_heartbeats(path, 1)
    # A stack is asked for only from processes that can give one, and this one is stopped when it is looked at.
    program = (
        "import sys, time\nfrom tprt.transport.heartbeat import HeartbeatWriter, Phase\n"
        f"HeartbeatWriter.open({str(path)!r}, 0, 2).set_phase(Phase.LOAD)\nprint(flush=True)\ntime.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        watch.begin_wait(None)
        assert watch.find_stuck_start(0.0) is None
        os.kill(process.pid, signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        stall = watch.find_stuck_start(0.0)
        assert stall is not None
        assert f"pid {process.pid}" in stall.text
        assert "is stopped" in stall.text
        assert watch.find_stuck_start(LONG_S) is None
    finally:
        process.kill()
        process.communicate()
