"""The ring by itself, both ends in one process: no message is lost, torn, doubled or overtaken."""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tprt.errors import PeerLostError, SequenceGapError, TransportError, TransportTimeoutError
from tprt.transport import ring_reader, ring_writer
from tprt.transport.large_message import LargeMessageReceiver, LargeMessageSender
from tprt.transport.memory_order import make_fence
from tprt.transport.ring_reader import RingReader
from tprt.transport.ring_writer import RingWriter
from tprt.transport.shm_ring import RingFds, RingGeometry, RingMap, SlotWord

WAIT_S = 10.0


class Ring:
    """A writer and its readers."""

    def __init__(self, folder: Path, num_slots: int, num_readers: int, slot_bytes: int) -> None:
        addresses = [f"ipc://{folder}/{id(self)}.{reader}" for reader in range(num_readers)]
        self.fds = RingFds.create(RingGeometry(num_slots, slot_bytes), num_readers)
        names = [f"rank {reader}" for reader in range(num_readers)]
        self.writer = RingWriter(self.fds, names, LargeMessageSender(addresses))
        self.readers = [
            RingReader(self.fds.of_reader(reader), reader, "the writer", LargeMessageReceiver(address))
            for reader, address in enumerate(addresses)
        ]

    def tamper(self, sequence: int, word: SlotWord, value: int) -> None:
        """Overwrite a word of the slot of a message."""
        memory = RingMap(self.fds.memory)
        memory.words[memory.slot_start(sequence) // 8 + word] = value
        memory.close()

    def close(self) -> None:
        for end in (self.writer, *self.readers):
            end.close()
            end.close()
        self.fds.close()


MakeRing = Callable[..., Ring]


@pytest.fixture
def make_ring(run_dir: Path) -> Iterator[MakeRing]:
    made: list[Ring] = []

    def make(num_slots: int = 8, num_readers: int = 1, slot_bytes: int = 256) -> Ring:
        made.append(Ring(run_dir, num_slots, num_readers, slot_bytes))
        return made[-1]

    yield make
    for ring in made:
        ring.close()


def payload(number: int, num_bytes: int) -> bytes:
    """Return bytes that show from which message each of them is."""
    return random.Random(number).randbytes(num_bytes)


@pytest.mark.parametrize("num_slots", [1, 2, 3, 8])
def test_it_wraps_at_exactly_its_number_of_slots(make_ring: MakeRing, num_slots: int) -> None:
    ring = make_ring(num_slots, num_readers=2)
    for first in range(0, 5 * num_slots, num_slots):
        for number in range(first, first + num_slots):
            ring.writer.send([payload(number, 100)], 0.0)
        with pytest.raises(TransportTimeoutError):
            ring.writer.send([b"one too many"], 0.0)
        for reader in ring.readers:
            for number in range(first, first + num_slots):
                assert reader.receive(WAIT_S) == payload(number, 100)
            assert reader.try_receive() is None


def test_a_slot_is_not_overwritten_before_the_slowest_reader_has_read_it(make_ring: MakeRing) -> None:
    ring = make_ring(num_slots=4, num_readers=3)
    slow, *fast = ring.readers
    for number in range(4):
        ring.writer.send([payload(number, 200)], WAIT_S)
    for reader in fast:
        assert [reader.receive(WAIT_S) for _ in range(4)] == [payload(number, 200) for number in range(4)]
    for number in range(4):
        with pytest.raises(TransportTimeoutError, match="rank 0 "):
            ring.writer.send([b"z" * 200], 0.0)
        assert slow.receive(WAIT_S) == payload(number, 200)
        ring.writer.send([payload(number + 4, 200)], 0.0)


def test_a_slot_takes_a_message_of_exactly_its_size(make_ring: MakeRing) -> None:
    ring = make_ring(num_slots=2, slot_bytes=128)
    for num_bytes in (0, 1, 127, 128, 129, 128, 5000, 0):
        ring.writer.send([payload(1, num_bytes)], WAIT_S)
        assert ring.readers[0].receive(WAIT_S) == payload(1, num_bytes)


def test_large_messages_keep_their_place_among_small_ones(make_ring: MakeRing) -> None:
    ring = make_ring(num_slots=4, num_readers=2)
    sizes = [10, 100_000, 20, 300_000]
    for _ in range(3):
        for number, num_bytes in enumerate(sizes):
            ring.writer.send([payload(number, num_bytes - 5), memoryview(b"parts")], WAIT_S)
        for reader in ring.readers:
            for number, num_bytes in enumerate(sizes):
                assert reader.try_receive() == payload(number, num_bytes - 5) + b"parts"


def test_parts_of_any_kind_of_buffer_are_stored_by_their_bytes(make_ring: MakeRing) -> None:
    ring = make_ring()
    words = memoryview(bytes(range(32))).cast("Q")
    ring.writer.send([b"a", bytearray(b"b"), words, b"", memoryview(b"c")], WAIT_S)
    assert ring.readers[0].receive(WAIT_S) == b"ab" + bytes(range(32)) + b"c"


def test_a_late_reader_gets_everything_from_the_first_message(run_dir: Path) -> None:
    fds = RingFds.create(RingGeometry(4, 64), 1)
    writer = RingWriter(fds, ["rank 0"])
    for number in range(4):
        writer.send([b"%d" % number], WAIT_S)
    with pytest.raises(TransportTimeoutError, match="rank 0 has not opened the ring"):
        writer.send([b"4"], 0.0)
    reader = RingReader(fds.of_reader(0), 0, "the writer")
    assert [reader.receive(WAIT_S) for _ in range(4)] == [b"0", b"1", b"2", b"3"]
    for end in (writer, reader, fds):
        end.close()


def test_a_message_that_is_missing_is_a_gap(make_ring: MakeRing) -> None:
    ring = make_ring(num_slots=4)
    for number in range(3):
        ring.writer.send([b"%d" % number], WAIT_S)
    ring.tamper(2, SlotWord.SEQUENCE, 6)
    assert ring.readers[0].receive(WAIT_S) == b"0"
    with pytest.raises(SequenceGapError, match="message 6 from the writer came; expected message 2"):
        ring.readers[0].receive(WAIT_S)
    with pytest.raises(SequenceGapError):
        ring.readers[0].try_receive()


def test_a_large_message_that_does_not_fit_its_marker_is_an_error(make_ring: MakeRing) -> None:
    ring = make_ring()
    ring.writer.send([bytes(1000)], WAIT_S)
    ring.tamper(1, SlotWord.SIZE, 999)
    with pytest.raises(
        SequenceGapError, match="message 1 of 1000 bytes came; its marker says message 1 of 999"
    ):
        ring.readers[0].receive(WAIT_S)


def test_a_large_message_that_does_not_come_is_a_timeout_and_not_a_hole(make_ring: MakeRing) -> None:
    ring = make_ring()
    ring.writer.send([b"small"], WAIT_S)
    ring.tamper(1, SlotWord.IS_MARKER, 1)
    for _ in range(2):
        with pytest.raises(TransportTimeoutError, match="message 1 of 5 bytes is late"):
            ring.readers[0].receive(0.1)
    ring.tamper(1, SlotWord.IS_MARKER, 0)
    assert ring.readers[0].receive(WAIT_S) == b"small"


def test_without_a_lane_for_large_messages_one_is_refused_and_nothing_is_sent(run_dir: Path) -> None:
    fds = RingFds.create(RingGeometry(2, 64), 1)
    writer, reader = RingWriter(fds, ["rank 0"]), RingReader(fds.of_reader(0), 0, "the writer")
    with pytest.raises(TransportError, match="a message of 65 bytes; this ring takes 64"):
        writer.send([bytes(65)], WAIT_S)
    writer.send([b"next"], WAIT_S)
    assert reader.receive(WAIT_S) == b"next"
    for end in (writer, reader, fds):
        end.close()


def test_a_closed_writer_refuses_to_send(make_ring: MakeRing) -> None:
    ring = make_ring()
    ring.writer.close()
    with pytest.raises(PeerLostError, match="closed"):
        ring.writer.send([b"x"], WAIT_S)


def test_fences_of_other_machines_carry_a_ring_as_well(
    make_ring: MakeRing, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    two_pairs = make_fence("aarch64")
    for module in (ring_reader, ring_writer):
        monkeypatch.setattr(module, "fence", lambda: calls.append(two_pairs()))
    ring = make_ring(num_slots=2)
    for number in range(6):
        ring.writer.send([b"%d" % number], WAIT_S)
        assert ring.readers[0].receive(WAIT_S) == b"%d" % number
    # One before publishing, one before reading, one before giving back, and one whenever room is looked for.
    assert len(calls) >= 6 * 3


def test_no_wake_up_is_lost_around_the_end_of_the_spin(make_ring: MakeRing) -> None:
    ring = make_ring(num_slots=2, num_readers=2)
    delays = random.Random(0)
    num_messages = 1500
    late: list[str] = []

    def read(reader: RingReader) -> None:
        for number in range(num_messages):
            if reader.receive(WAIT_S) != b"%d" % number:
                late.append(f"not {number}")

    threads = [threading.Thread(target=read, args=(reader,)) for reader in ring.readers]
    for thread in threads:
        thread.start()
    for number in range(num_messages):
        until_ns = time.monotonic_ns() + delays.randrange(120_000)
        while time.monotonic_ns() < until_ns:
            os.sched_yield()
        ring.writer.send([b"%d" % number], WAIT_S)
    for thread in threads:
        thread.join(WAIT_S)
    assert not late
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize(("num_slots", "slot_bytes"), [(0, 64), (-1, 64), (1, 0), (1, 65), (10**9, 64)])
def test_an_impossible_geometry_is_refused(num_slots: int, slot_bytes: int) -> None:
    with pytest.raises(TransportError, match=f"a ring of {num_slots} slots of {slot_bytes} bytes"):
        RingGeometry(num_slots, slot_bytes)


@pytest.mark.parametrize("num_readers", [0, 251])
def test_an_impossible_number_of_readers_is_refused(num_readers: int, no_descriptor_is_left: None) -> None:
    with pytest.raises(TransportError, match=f"a ring for {num_readers} readers; expected 1 to 250"):
        RingFds.create(RingGeometry(), num_readers)


def test_a_memory_that_is_no_ring_is_refused(no_descriptor_is_left: None) -> None:
    memory = os.memfd_create("other")
    with pytest.raises(TransportError, match="expected a tprt ring"):
        RingMap(memory)
    fds = RingFds.create(RingGeometry(2, 64), 1)
    os.ftruncate(fds.memory, 4096)
    with pytest.raises(TransportError, match="a ring of 4096 bytes; its header says"):
        RingMap(fds.memory)
    os.close(memory)
    fds.close()


def test_the_default_ring_takes_a_few_mebibytes() -> None:
    assert RingGeometry().total_bytes(8) < 4 * 2**20
