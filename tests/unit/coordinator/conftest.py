"""The maker of engines, for tests of the coordinator."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.coordinator.engine_of_threads import LIMITS, Engine, Make
from tprt.coordinator.limits import SchedulerLimits


@pytest.fixture(params=["inproc", "shm"])
def make(tmp_path: Path, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[Make]:
    """Return a maker of engines; they are stopped at the end and leave no thread and no descriptor."""
    gc.collect()
    threads, descriptors = threading.active_count(), sorted(os.listdir("/proc/self/fd"))
    engines: list[Engine] = []

    def make_engine(world_size: int = 2, limits: SchedulerLimits = LIMITS, **timeouts: float) -> Engine:
        folder = tmp_path / str(len(engines))
        folder.mkdir()
        engines.append(Engine(request.param, folder, world_size, limits, **timeouts))
        return engines[-1]

    yield make_engine
    while engines:
        engines.pop().stop()
    # In-process lanes let go of their descriptors when the last end is collected; an error in a log record
    # would keep them.
    caplog.get_records("call").clear()
    gc.collect()
    assert threading.active_count() == threads
    assert sorted(os.listdir("/proc/self/fd")) == descriptors
