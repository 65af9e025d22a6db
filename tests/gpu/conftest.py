"""What tests on a GPU share."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module")
def mps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run CUDA's MPS daemon where it is installed; without it the ranks take turns, and tests take longer.

    This process opens no device while it runs: the daemon would wait for it.
    """
    daemon = shutil.which("nvidia-cuda-mps-control")
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("mps")
        patch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(folder))
        patch.setenv("CUDA_MPS_LOG_DIRECTORY", str(folder))
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        if daemon is None:
            yield
            return
        subprocess.run([daemon, "-d"], check=True, timeout=30)
        yield
        subprocess.run([daemon], input=b"quit -t 3\n", check=True, timeout=30)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ranks see one GPU, whatever the machine has."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", first)
