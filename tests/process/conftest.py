"""What tests of whole deployments share."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.checkpoints import TinyModel
from tests.support.deployments import (
    TinyDeployment,
    descendants,
    make_tiny_deployment,
    new_shared_memory,
    shared_memory,
    still_in,
    still_there,
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyDeployment:
    """A deployment that starts in seconds; its ranks have 2 and 1 KV heads, its sequences may be long."""
    return make_tiny_deployment(tmp_path_factory.mktemp("tiny"), TinyModel(heads=9, kv_heads=3), 65536)


@pytest.fixture
def tmpdir_of_children(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """The folder where run directories are made; at the end they, all children and shared memory are gone."""
    tmp_path_factory.getbasetemp()  # pytest makes its own folder when first asked, and not in this one
    before = set(descendants(os.getpid()))
    shared = shared_memory()
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        yield Path(folder)
        assert still_in(Path(folder)) == []
    assert still_there([pid for pid in descendants(os.getpid()) if pid not in before]) == []
    assert new_shared_memory(shared) == []
