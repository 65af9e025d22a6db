"""The memory of a group: made once, passed on by descriptor, and gone with the last of them."""

from __future__ import annotations

import os

import pytest

from tprt.distributed.shm_memory import NUM_BUFFERS, ShmGroupMemory, Word, line_start, slots_start
from tprt.errors import TransportError


@pytest.mark.usefixtures("no_descriptor_is_left")
def test_another_process_finds_the_same_memory_behind_the_descriptors() -> None:
    memory = ShmGroupMemory.create(3, slot_bytes=5000)
    copy = ShmGroupMemory.from_fds([os.dup(fd) for fd in memory.fds])
    assert (copy.world_size, copy.slot_bytes) == (3, 8192)
    with memory.map() as mine, copy.map() as theirs:
        assert len(mine) == slots_start(3) + NUM_BUFFERS * 3 * 8192
        mine[-1] = 7
        assert theirs[-1] == 7
    copy.close()
    memory.close()
    memory.close()


@pytest.mark.usefixtures("no_descriptor_is_left")
def test_a_pid_noted_from_outside_is_in_the_line_of_its_rank() -> None:
    memory = ShmGroupMemory.create(2)
    memory.set_pid(1, 4321)
    with memory.map() as mapping, memoryview(mapping) as whole, whole.cast("Q") as words:
        assert words[line_start(1) + Word.PID] == 4321
        assert words[line_start(0) + Word.PID] == 0
    memory.close()


def test_lines_lie_before_the_slots_and_do_not_share_a_cache_line() -> None:
    for world_size in (2, 8, 63, 64):
        starts = [line_start(rank) * 8 for rank in range(world_size)]
        assert all(start % 64 == 0 for start in starts)
        assert sorted(set(starts)) == starts
        assert starts[-1] + 64 <= slots_start(world_size)
    assert max(Word) < 8


@pytest.mark.usefixtures("no_descriptor_is_left")
def test_descriptors_of_something_else_are_refused() -> None:
    memory = ShmGroupMemory.create(2)
    with pytest.raises(TransportError, match=r"2 descriptors with magic .* world size 2; expected"):
        ShmGroupMemory.from_fds(memory.fds[:2])
    with pytest.raises(TransportError, match="magic 0x0"):
        ShmGroupMemory.from_fds([])
    memory.close()
    empty = os.memfd_create("empty")
    with pytest.raises(TransportError, match="magic 0x0"):
        ShmGroupMemory.from_fds([empty])
    os.close(empty)


@pytest.mark.parametrize("world_size", [-1, 0, 1, 65])
def test_a_world_that_needs_or_allows_no_shared_memory_is_refused(world_size: int) -> None:
    with pytest.raises(TransportError, match=f"{world_size} ranks: expected from 2 to 64"):
        ShmGroupMemory.create(world_size)
