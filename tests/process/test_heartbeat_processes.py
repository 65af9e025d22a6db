"""Heartbeats of real processes: the one that is stuck is named, with its Python stack if it can give one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from launch.run_dir import heartbeats_path, stack_path
from tprt.coordinator.stall_probe import StallProbe
from tprt.transport.heartbeat import HeartbeatReader
from tprt.transport.heartbeat_file import create_heartbeats
from tprt.transport.peer_process import is_stopped, process_state, request_stack

ROOT = Path(__file__).parents[2]
WAIT_S = 20.0
STALL_S = 0.3
LONG_S = 1.0

# A rank that goes from collective to collective, and at number `stop_at` does `how` in layer 3.
CHILD = """
import sys, time
from pathlib import Path
from launch.stack_dump import install_stack_dumps
from launch.run_dir import heartbeats_path
run_dir, rank, stop_at, how = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
install_stack_dumps(run_dir, f"rank {rank}")
from tprt.transport.heartbeat import HeartbeatWriter, Phase

def wait_for_a_lock_that_nobody_gives_back():
    time.sleep(60)

def wait_in_the_collective():
    time.sleep(60)

def crash():
    import ctypes
    ctypes.string_at(0)

beat = HeartbeatWriter.open(heartbeats_path(run_dir, 0), rank)
beat.begin_step(41, Phase.DECODE)
for number in range(1, stop_at):
    beat.enter_layer(number // 2)
    beat.enter_collective(number, "all_reduce")
    beat.leave_collective()
if how == "collective":
    beat.enter_collective(stop_at, "all_reduce")
    wait_in_the_collective()
elif how == "crash":
    crash()
elif how == "work":
    while True:
        beat.enter_layer(int(time.monotonic() * 100) % 30)
        time.sleep(0.01)
wait_for_a_lock_that_nobody_gives_back()
"""

StartRanks = Callable[..., tuple[StallProbe, list[subprocess.Popen[bytes]]]]


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[StartRanks]:
    """Start a rank for each way to get stuck, and wait until every one is; at the end all are gone."""
    ranks: list[subprocess.Popen[bytes]] = []
    probes: list[StallProbe] = []

    def start(*hows: str) -> tuple[StallProbe, list[subprocess.Popen[bytes]]]:
        create_heartbeats(heartbeats_path(tmp_path, 0), len(hows))
        for rank, how in enumerate(hows):
            arguments = [str(tmp_path), str(rank), "8", how]
            ranks.append(subprocess.Popen([sys.executable, "-c", CHILD, *arguments], cwd=ROOT))
        reader = HeartbeatReader.open(heartbeats_path(tmp_path, 0))
        stuck = [(8, True) if how == "collective" else (7, False) for how in hows]
        wait_until(lambda: [(beat.collective, beat.inside) for beat in reader.read()] == stuck)
        probes.append(StallProbe(reader, [stack_path(tmp_path, f"rank {rank}") for rank in range(len(hows))]))
        probes[-1].begin_wait(41)
        return probes[-1], ranks

    yield start
    for probe in probes:
        probe.close()
    for rank in ranks:
        rank.kill()
        rank.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def stop(rank: subprocess.Popen[bytes]) -> None:
    rank.send_signal(signal.SIGSTOP)
    wait_until(lambda: is_stopped(process_state(rank.pid)))


def test_a_stopped_rank_is_named_and_not_waited_for(start_ranks: StartRanks) -> None:
    probe, ranks = start_ranks("collective", "python", "collective")
    stop(ranks[1])
    wait_until(lambda: probe.has_stalled(STALL_S))
    report = probe.report()
    assert report.rank == 1
    assert report.text.startswith("step 41 (decode) made no progress for ")
    assert (
        f"ranks 0 and 2 wait in all_reduce 8; rank 1 (host {os.uname().nodename}, pid {ranks[1].pid})"
        in report.text
    )
    assert "has not entered it: last seen in layer 3 after all_reduce 7" in report.text
    assert report.text.endswith("its process is stopped (state T)")
    assert report.stack == "", "a stopped process cannot show its stack"


def test_a_rank_that_is_stuck_in_python_is_named_with_the_function_that_it_is_in(
    start_ranks: StartRanks,
) -> None:
    probe, ranks = start_ranks("collective", "collective", "python")
    wait_until(lambda: probe.has_stalled(STALL_S))
    report = probe.report()
    assert report.rank == 2
    assert "its process sleeps (state S)" in report.text
    assert "wait_for_a_lock_that_nobody_gives_back" in report.stack
    assert "wait_in_the_collective" not in report.stack
    assert [rank.poll() for rank in ranks] == [None] * 3, "to be asked ends nobody"
    again = probe.report().stack
    assert again.count("wait_for_a_lock") == report.stack.count("wait_for_a_lock"), "each dump is read once"


def test_when_all_hang_in_one_collective_the_stack_of_one_shows_where(start_ranks: StartRanks) -> None:
    probe, _ = start_ranks("collective", "collective")
    wait_until(lambda: probe.has_stalled(STALL_S))
    report = probe.report()
    assert report.rank is None
    assert report.text.endswith("wait in all_reduce 8: all have entered it, so the collective itself hangs")
    assert "wait_in_the_collective" in report.stack


def test_a_rank_that_goes_on_layer_by_layer_is_no_stall(start_ranks: StartRanks) -> None:
    probe, _ = start_ranks("collective", "work")
    time.sleep(LONG_S + 0.1)
    assert not probe.has_stalled(LONG_S)


def test_a_rank_that_was_killed_is_named_as_gone(start_ranks: StartRanks) -> None:
    probe, ranks = start_ranks("collective", "python")
    ranks[1].kill()
    ranks[1].wait()
    report = probe.report()
    assert report.rank == 1
    assert report.text.endswith("its process is gone")
    assert report.stack == ""


def test_a_crash_leaves_the_python_stack_that_led_to_it(tmp_path: Path) -> None:
    create_heartbeats(heartbeats_path(tmp_path, 0), 1)
    ran = subprocess.run(
        [sys.executable, "-c", CHILD, str(tmp_path), "0", "1", "crash"], cwd=ROOT, timeout=WAIT_S, check=False
    )
    assert ran.returncode == -signal.SIGSEGV
    stack = stack_path(tmp_path, "rank 0").read_text()
    assert "Segmentation fault" in stack
    assert "in crash" in stack


def test_a_process_that_would_die_of_the_question_is_not_asked(tmp_path: Path) -> None:
    (tmp_path / "stack").touch()
    with subprocess.Popen(["sleep", "60"]) as innocent:
        assert request_stack(innocent.pid, tmp_path / "stack") == ""
        assert innocent.poll() is None
        innocent.kill()
    assert request_stack(innocent.pid, tmp_path / "stack") == ""
