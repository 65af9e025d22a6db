"""Fixtures that check at the end that nothing is left behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tprt.transport.channel import WorkerHub, WorkerLink
from tprt.transport.hub import ShmWorkerHub
from tprt.transport.inproc import make_inproc_group
from tprt.transport.link import ShmWorkerLink


@pytest.fixture
def no_descriptor_is_left() -> Iterator[None]:
    """Check at the end that this process has the descriptors that it had, and no ring is mapped."""
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert "tprt-ring" not in Path("/proc/self/maps").read_text()


@pytest.fixture
def run_dir(no_descriptor_is_left: None) -> Iterator[Path]:
    """Return a private folder with a short path, empty again once everything in it is closed."""
    with tempfile.TemporaryDirectory(prefix="tprt-test-") as folder:
        yield Path(folder)
        assert os.listdir(folder) == []


@dataclass
class Group:
    """A hub and its links, all connected; `kind` is `inproc` or `shm`."""

    kind: str
    hub: WorkerHub
    links: list[WorkerLink]


MakeGroup = Callable[[int], Group]


def connect_group(path: str, world_size: int, **listen: Any) -> Group:
    """Return a hub at `path` and its links, all in this process."""
    hub = ShmWorkerHub.listen(path, epoch=0, world_size=world_size, **listen)
    with ThreadPoolExecutor(world_size) as pool:
        joining = [
            pool.submit(ShmWorkerLink.connect, path, epoch=0, rank=rank, timeout_s=10.0)
            for rank in range(world_size)
        ]
        hub.accept_all(10.0)
        return Group("shm", hub, [future.result() for future in joining])


@pytest.fixture(params=["inproc", "shm"])
def make_group(request: pytest.FixtureRequest, run_dir: Path) -> Iterator[MakeGroup]:
    """Return a maker of groups of either kind; all of them are closed at the end."""
    made: list[Group] = []

    def make(world_size: int) -> Group:
        if request.param == "inproc":
            made.append(Group("inproc", *make_inproc_group(world_size)))
        else:
            made.append(connect_group(f"{run_dir}/hub{len(made)}", world_size))
        return made[-1]

    yield make
    for group in made:
        for end in (*group.links, group.hub):
            end.close()
            end.close()
