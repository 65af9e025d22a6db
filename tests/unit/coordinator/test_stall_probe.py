"""The probe sees a stall from when the ranks were told to move, and reports with what it finds around it."""

from __future__ import annotations

import faulthandler
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tprt.coordinator import stall_probe
from tprt.coordinator.stall_probe import StallProbe
from tprt.transport import heartbeat
from tprt.transport.heartbeat import HeartbeatReader, HeartbeatWriter, Phase
from tprt.transport.heartbeat_file import create_heartbeats
from tprt.transport.peer_process import DUMP_SIGNAL

Beats = tuple[StallProbe, list[HeartbeatWriter]]


@pytest.fixture
def beats(tmp_path: Path) -> Iterator[Beats]:
    """Two ranks that this process plays, and a probe of them; it dumps its stack as rank 1."""
    create_heartbeats(tmp_path / "beats", 2)
    writers = [HeartbeatWriter.open(tmp_path / "beats", rank) for rank in range(2)]
    paths = [tmp_path / f"stack-{rank}" for rank in range(2)]
    probe = StallProbe(HeartbeatReader.open(tmp_path / "beats"), paths)
    with paths[1].open("ab", buffering=0) as file:
        faulthandler.register(DUMP_SIGNAL, file, chain=False)
        yield probe, writers
        faulthandler.unregister(DUMP_SIGNAL)
    probe.close()
    probe.close()
    for writer in writers:
        writer.close()


def test_a_wait_that_begins_anew_and_a_rank_that_moves_end_a_stall(
    beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe, writers = beats
    assert not probe.has_stalled(60.0)
    later_ns = time.monotonic_ns() + 100 * 10**9
    monkeypatch.setattr(stall_probe, "monotonic_ns", lambda: later_ns)
    assert probe.has_stalled(60.0)
    probe.begin_wait(0)
    assert not probe.has_stalled(60.0)
    later_ns += 61 * 10**9
    assert probe.has_stalled(60.0)
    monkeypatch.setattr(heartbeat, "monotonic_ns", lambda: later_ns - 10**9)
    writers[1].enter_layer(3)
    assert not probe.has_stalled(60.0)
    assert probe.has_stalled(0.5)


def test_the_report_names_the_rank_that_is_behind_with_its_stack(beats: Beats) -> None:
    probe, writers = beats
    probe.begin_wait(7)
    for writer in writers:
        writer.begin_step(7, Phase.PREFILL)
    writers[0].enter_collective(1, "all_reduce")
    report = probe.report()
    assert report.rank == 1
    assert report.text.startswith("step 7 (prefill) made no progress for ")
    assert f"rank 1 (host {os.uname().nodename}, pid {os.getpid()}) has not entered it" in report.text
    assert "in test_the_report_names_the_rank_that_is_behind_with_its_stack" in report.stack
    assert str(report).endswith(report.text)


def test_a_rank_that_has_not_begun_is_named_without_a_stack(tmp_path: Path) -> None:
    create_heartbeats(tmp_path / "beats", 1)
    probe = StallProbe(HeartbeatReader.open(tmp_path / "beats"), [tmp_path / "stack"])
    report = probe.report()
    assert report.text.endswith("rank 0 is in spawn: none of them has gone further")
    assert report.stack == ""
    probe.close()
