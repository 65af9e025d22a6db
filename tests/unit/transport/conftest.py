"""Fixtures that check at the end that nothing is left behind."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


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
