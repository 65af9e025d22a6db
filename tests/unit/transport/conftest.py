"""Fixtures that check at the end that nothing is left behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.transport.groups import Group, connect_group, connect_spread_group
from tprt.transport.inproc import make_inproc_group


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


MakeGroup = Callable[[int], Group]


@pytest.fixture(params=["inproc", "shm", "spread"])
def make_group(request: pytest.FixtureRequest, run_dir: Path) -> Iterator[MakeGroup]:
    """Return a maker of groups of each kind; all of them are closed at the end."""
    made: list[Group] = []

    def make(world_size: int) -> Group:
        if request.param == "inproc":
            made.append(Group("inproc", *make_inproc_group(world_size)))
        else:
            connect = connect_group if request.param == "shm" else connect_spread_group
            made.append(connect(f"{run_dir}/hub{len(made)}", world_size))
        return made[-1]

    yield make
    for group in made:
        for end in (*group.links, group.hub):
            end.close()
            end.close()
