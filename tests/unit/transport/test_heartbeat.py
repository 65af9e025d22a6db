"""What ranks and the coordinator write is what anyone reads; files that do not fit are refused by name."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tprt.distributed.tp_group import Collectives
from tprt.errors import TransportError
from tprt.transport.coordinator_beat import CoordinatorBeat, read_coordinator
from tprt.transport.heartbeat import (
    AFTER_LAYERS,
    BEFORE_LAYERS,
    COLLECTIVE_KINDS,
    NO_STEP,
    HeartbeatReader,
    HeartbeatWriter,
    Phase,
    RankBeat,
    announce_process,
)
from tprt.transport.heartbeat_file import LINE_BYTES, create_heartbeats


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The heartbeats of three ranks."""
    path = tmp_path / "heartbeats-0"
    create_heartbeats(path, 3)
    return path


def beat_of(path: Path, rank: int) -> RankBeat:
    reader = HeartbeatReader.open(path)
    try:
        return reader.read()[rank]
    finally:
        reader.close()


def test_a_rank_that_has_not_begun_has_given_no_sign(path: Path) -> None:
    assert [beat_of(path, rank) for rank in range(3)] == [RankBeat(0), RankBeat(1), RankBeat(2)]
    assert RankBeat(0).phase is Phase.SPAWN


def test_each_field_is_read_as_it_was_written_and_stays_with_its_rank(path: Path) -> None:
    before_ns = time.monotonic_ns()
    writers = [HeartbeatWriter.open(path, rank, epoch=5) for rank in range(3)]
    writers[1].on_progress(7, 2**40)
    writers[1].begin_step(41, Phase.DECODE)
    writers[1].enter_layer(12)
    writers[1].enter_collective(83, "all_reduce")
    beat = beat_of(path, 1)
    assert before_ns < beat.time_ns <= time.monotonic_ns()
    assert beat == RankBeat(
        *(1, beat.time_ns, 5, 41, Phase.DECODE, 12, 83, "all_reduce", True, os.getpid(), 7, 2**40)
    )
    for other in (0, 2):
        untouched = beat_of(path, other)
        assert untouched == RankBeat(other, untouched.time_ns, epoch=5, pid=os.getpid())
    for writer in writers:
        writer.close()
        writer.close()


NOTES: list[tuple[Callable[[HeartbeatWriter], None], dict[str, object]]] = [
    (lambda writer: writer.set_phase(Phase.LOAD), {"phase": Phase.LOAD}),
    (lambda writer: writer.on_progress(3, 9), {"done_bytes": 3, "total_bytes": 9}),
    (lambda writer: writer.begin_step(0, Phase.PREFILL), {"phase": Phase.PREFILL, "layer": BEFORE_LAYERS}),
    (lambda writer: writer.enter_layer(0), {"layer": 0}),
    (
        lambda writer: writer.enter_collective(1, "barrier"),
        {"collective": 1, "kind": "barrier", "inside": True},
    ),
    (lambda writer: writer.leave_collective(), {"collective": 1, "kind": "barrier", "inside": False}),
    (lambda writer: writer.leave_layers(), {"layer": AFTER_LAYERS}),
]


def test_every_note_is_a_sign_of_life_and_changes_nothing_else(path: Path) -> None:
    writer, reader = HeartbeatWriter.open(path, 2), HeartbeatReader.open(path)
    expected = {"step": NO_STEP}
    for note, changes in NOTES:
        last_ns = reader.last_change_ns()
        while time.monotonic_ns() == last_ns:
            pass
        note(writer)
        beat = reader.read()[2]
        assert beat.time_ns == reader.last_change_ns() > last_ns
        expected |= changes | ({"step": 0} if "layer" in changes and "phase" in changes else {})
        assert {name: getattr(beat, name) for name in expected} == expected
    reader.close()
    writer.close()


@pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.words)
def test_a_phase_is_read_back_by_everyone_who_asks(path: Path, phase: Phase) -> None:
    writer = HeartbeatWriter.open(path, 0)
    writer.set_phase(phase)
    assert writer.phase is phase
    assert beat_of(path, 0).phase is phase
    writer.close()


@pytest.mark.parametrize("name", [kind for kind in COLLECTIVE_KINDS if kind])
def test_a_collective_with_a_large_number_is_still_itself(path: Path, name: str) -> None:
    writer = HeartbeatWriter.open(path, 0)
    writer.enter_collective(2**50, name)
    writer.leave_collective()
    beat = beat_of(path, 0)
    assert (beat.collective, beat.kind, beat.inside) == (2**50, name, False)
    writer.close()


def test_there_is_a_kind_for_every_collective() -> None:
    methods = {name for name in vars(Collectives) if not name.startswith("_")}
    assert set(COLLECTIVE_KINDS) - {""} == methods - {"close"}


def test_a_writer_without_a_file_keeps_its_phase() -> None:
    writer = HeartbeatWriter.detached()
    writer.begin_step(3, Phase.DECODE)
    assert writer.phase is Phase.DECODE
    writer.close()


def test_a_file_is_one_line_for_each_rank_and_two_more(path: Path) -> None:
    assert path.stat().st_size == 5 * LINE_BYTES
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_the_coordinator_has_a_line_of_its_own(path: Path) -> None:
    assert read_coordinator(path) is None
    coordinator = CoordinatorBeat.open(path, epoch=2, restarts=1)
    opened = read_coordinator(path)
    assert opened is not None
    assert (opened.epoch, opened.restarts, opened.serves, opened.step) == (2, 1, False, NO_STEP)
    assert opened.pid == os.getpid()
    coordinator.begin_serving()
    ready_ns = time.monotonic_ns()
    coordinator.set_requests(4, 2, oldest_waiting_ns=77)
    coordinator.finish_step(9)
    record = read_coordinator(path)
    assert record is not None
    assert record.serves
    assert (record.num_running, record.num_waiting, record.oldest_waiting_ns) == (4, 2, 77)
    assert (record.step, record.step_ns) == (9, record.time_ns)
    assert record.step_ns >= ready_ns
    assert beat_of(path, 0) == RankBeat(0)
    coordinator.close()
    coordinator.close()


def test_a_file_that_is_not_there_is_named_with_what_makes_it(tmp_path: Path) -> None:
    for open_ in (HeartbeatReader.open, read_coordinator, lambda path: HeartbeatWriter.open(path, 0)):
        with pytest.raises(TransportError, match=rf"{tmp_path}/none: no heartbeats .*create_heartbeats"):
            open_(tmp_path / "none")


@pytest.mark.parametrize(
    ("offset", "written", "message"),
    [
        (0, b"x", "expected heartbeats of version"),
        (8, b"\x09", "and version 9; expected heartbeats of version"),
        (16, b"\x04", "640 bytes for 4 ranks; the file is damaged"),
        (16, b"\x00", "640 bytes for 0 ranks; the file is damaged"),
    ],
)
def test_a_file_of_another_kind_is_refused(path: Path, offset: int, written: bytes, message: str) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(written)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransportError, match=message):
        HeartbeatReader.open(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(TransportError, match="magic 0x0"):
        HeartbeatReader.open(tmp_path / "empty")


@pytest.mark.parametrize("rank", [-1, 3])
def test_a_rank_that_the_file_has_no_line_for_is_refused(path: Path, rank: int) -> None:
    with pytest.raises(TransportError, match=f"rank {rank}; expected a rank from 0 to 2"):
        HeartbeatWriter.open(path, rank)


def test_a_file_that_cannot_be_made_is_named_and_leaves_no_draft(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match="cannot be written: No such file"):
        create_heartbeats(tmp_path / "nowhere" / "beats", 2)
    (tmp_path / "folder").mkdir()
    with pytest.raises(TransportError, match="cannot be written: Is a directory"):
        create_heartbeats(tmp_path / "folder", 2)
    with pytest.raises(TransportError, match="heartbeats of 0 ranks"):
        create_heartbeats(tmp_path / "beats", 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_a_process_that_notes_nothing_is_known_by_who_has_started_it(path: Path) -> None:
    create_heartbeats(path, 2)
    announce_process(path, 1, 4711, 3)
    reader = HeartbeatReader.open(path)
    beat = reader.read()[1]
    assert (beat.pid, beat.epoch, beat.phase, beat.step) == (4711, 3, Phase.SPAWN, NO_STEP)
    writer = HeartbeatWriter.open(path, 1, 3)
    announce_process(path, 1, 4711, 2)
    assert (reader.read()[1].pid, reader.read()[1].epoch) == (os.getpid(), 3)
    writer.close()
    reader.close()
