"""How ranks wait for each other: nobody misses a wake-up, nobody passes early, a loss is seen at once."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tprt.distributed import shm_rounds
from tprt.distributed.shm_memory import ShmGroupMemory, Word, line_start
from tprt.distributed.shm_rounds import ShmRounds
from tprt.errors import PeerLostError, TransportError, TransportTimeoutError

RunRanks = Callable[..., list[Any]]
MakeRounds = Callable[..., list[ShmRounds]]


@pytest.fixture
def memory(no_descriptor_is_left: None) -> Iterator[ShmGroupMemory]:
    memory = ShmGroupMemory.create(3, 4096)
    yield memory
    memory.close()


@pytest.fixture
def words(memory: ShmGroupMemory) -> Iterator[memoryview]:
    with memory.map() as mapping, memoryview(mapping) as whole, whole.cast("Q") as words:
        yield words


@pytest.fixture
def make_rounds(memory: ShmGroupMemory, words: memoryview) -> Iterator[MakeRounds]:
    made: list[ShmRounds] = []

    def make(*ranks: int, timeout_s: float = 10.0) -> list[ShmRounds]:
        made.extend(ShmRounds(rank, memory, words, timeout_s, hex) for rank in ranks)
        return made

    yield make
    for rounds in made:
        rounds.close()


@pytest.mark.parametrize("spin_us", [0.0, 30.0, 500.0])
def test_no_rank_passes_a_round_early_and_no_wake_up_is_lost(
    spin_us: float, make_rounds: MakeRounds, run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm_rounds, "_SPIN_US", spin_us)
    monkeypatch.setattr(shm_rounds, "_HOT_POLLS", 1)
    num_rounds = 400
    counts = [0, 0, 0]

    def work(rank: int, rounds: ShmRounds) -> float:
        delays = random.Random(rank)
        longest_s = 0.0
        for number in range(1, num_rounds + 1):
            if delays.random() < 0.1:
                time.sleep(delays.random() * 0.001)
            counts[rank] = number
            start_s = time.monotonic()
            rounds.complete(5)
            longest_s = max(longest_s, time.monotonic() - start_s)
            assert min(counts) >= number
            assert max(counts) <= number + 1
        return longest_s

    # A lost wake-up would last until the deadline, 10 s.
    assert max(run_ranks(make_rounds(0, 1, 2), work)) < 5


def test_a_waiting_rank_sleeps_in_the_kernel(make_rounds: MakeRounds) -> None:
    rounds = make_rounds(0, timeout_s=1.0)[0]
    start_s = time.thread_time()
    with pytest.raises(TransportTimeoutError):
        rounds.complete(5)
    # The host of a busy virtual machine counts its own pauses in.
    assert time.thread_time() - start_s < 0.2


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        yield process
        process.kill()


def test_a_rank_whose_process_dies_is_named_at_once(
    make_rounds: MakeRounds, words: memoryview, child: subprocess.Popen[bytes], run_ranks: RunRanks
) -> None:
    words[line_start(2) + Word.PID] = child.pid
    words[line_start(2) + Word.COLLECTIVE] = 17

    def work(rank: int, rounds: ShmRounds) -> float:
        with pytest.raises(
            PeerLostError, match=rf"rank 2 \(process {child.pid}\) is dead.* its last one was 17"
        ):
            rounds.complete(5)
        return time.monotonic()

    def kill_later() -> float:
        time.sleep(0.1)
        child.kill()
        return time.monotonic()

    ends = [*make_rounds(0, 1, timeout_s=60), None]
    *seen_s, killed_s = run_ranks(ends, lambda rank, end: work(rank, end) if end else kill_later())
    assert max(seen_s) - killed_s < 10


def test_a_process_that_was_dead_before_anyone_waited_is_lost(
    make_rounds: MakeRounds, words: memoryview
) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    words[line_start(1) + Word.PID] = gone.pid
    with pytest.raises(PeerLostError, match=r"rank 1 .* is dead"):
        make_rounds(0, timeout_s=60)[0].complete(5)


def test_a_rank_that_posted_before_it_died_is_lost_only_for_the_next_round(
    make_rounds: MakeRounds, words: memoryview, child: subprocess.Popen[bytes]
) -> None:
    rounds = make_rounds(0, 1, timeout_s=0.2)[0]
    for rank in (1, 2):
        words[line_start(rank) + Word.SIGNATURE + 1] = 5
    words[line_start(2) + Word.PID] = child.pid
    words[line_start(2)] = 1
    child.kill()
    with pytest.raises(
        TransportTimeoutError, match=r"for rank 1 \(process \d+, \w+\), whose last collective was 0$"
    ):
        rounds.complete(5)
    words[line_start(1)] = 2
    with pytest.raises(PeerLostError, match=r"rank 2 .* is dead"):
        rounds._sleep(2, time.monotonic_ns())


def test_a_rank_that_never_joined_is_named_so(make_rounds: MakeRounds) -> None:
    with pytest.raises(
        TransportTimeoutError, match=r"for rank 1 \(never joined\).* and rank 2 \(never joined\)"
    ):
        make_rounds(0, timeout_s=0.01)[0].complete(5)


def test_ranks_that_do_different_things_are_told(make_rounds: MakeRounds, run_ranks: RunRanks) -> None:
    def work(rank: int, rounds: ShmRounds) -> None:
        rounds.begin_collective()
        with pytest.raises(
            TransportError, match=r"diverged: .* in collective 1, 0x.*all ranks must make the same"
        ):
            rounds.complete(0x10 + rank)
        with pytest.raises(TransportError, match="cannot use this group any more"):
            rounds.begin_collective()

    run_ranks(make_rounds(0, 1, 2), work)


def test_the_words_of_a_rank_tell_where_it_is(make_rounds: MakeRounds, words: memoryview) -> None:
    rounds = make_rounds(1, timeout_s=0.01)[0]
    for _ in range(3):
        rounds.begin_collective()
    line = line_start(1)
    assert words[line + Word.COLLECTIVE] == 3
    assert words[line + Word.PID] == os.getpid()
    rounds.close()
    assert words[line + Word.CLOSED] == 1
