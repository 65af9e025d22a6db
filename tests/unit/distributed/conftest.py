"""Fixtures that play the ranks of a group with the threads of one process, and check that nothing is left."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tprt.distributed.shm_collectives import ShmCollectives
from tprt.distributed.shm_memory import ShmGroupMemory

_DEADLINE_S = 30


def _run_ranks(ends: list[Any], function: Callable[[int, Any], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(ends)) as pool:
        futures = [pool.submit(function, rank, end) for rank, end in enumerate(ends)]
        return [future.result(_DEADLINE_S) for future in futures]


@pytest.fixture
def run_ranks() -> Iterator[Callable[..., list[Any]]]:
    """Call `function(rank, end)` for each rank in a thread of its own; return the results in rank order."""
    before = threading.active_count()
    yield _run_ranks
    assert threading.active_count() == before


@pytest.fixture
def no_descriptor_is_left() -> Iterator[None]:
    """Check at the end that this process has the descriptors that it had."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def make_shm_ends(no_descriptor_is_left: None) -> Iterator[Callable[..., list[ShmCollectives]]]:
    """Return a maker of groups; all of them are closed at the end and leave no descriptor or mapping."""
    made: list[ShmCollectives] = []

    def make(world_size: int, slot_bytes: int = 65536, timeout_s: float = 10.0) -> list[ShmCollectives]:
        memory = ShmGroupMemory.create(world_size, slot_bytes)
        ends = [ShmCollectives(rank, world_size, memory, timeout_s) for rank in range(world_size)]
        memory.close()
        made.extend(ends)
        return ends

    yield make
    for end in made:
        end.close()
    with open("/proc/self/maps") as maps:
        assert "tprt-collectives" not in maps.read()
