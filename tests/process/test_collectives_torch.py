"""gloo between real processes: the same interface and results as shared memory, the same bits on all ranks."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tprt.distributed.factory import GroupDeadlines, make_group
from tprt.distributed.tp_group import TPGroup
from tprt.errors import TransportError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
WORLD_SIZE = 3


def play_rank(rank: int, run_dir: str) -> None:
    torch.set_num_threads(1)
    group = make_group("gloo", rank, WORLD_SIZE, CPU, run_dir, GroupDeadlines(20.0, 20.0))
    with pytest.raises(TransportError, match="default group already"):
        make_group("gloo", rank, WORLD_SIZE, CPU, run_dir, GroupDeadlines(20.0, 20.0))
    check(group)
    print(json.dumps({"digest": digest_of_sums(group)}), flush=True)
    try:
        while True:
            group.all_reduce(torch.ones(576))
    except TransportError as error:
        print(json.dumps({"error": type(error).__name__, "time_s": time.monotonic()}), flush=True)
    group.close()
    group.close()


def check(group: TPGroup) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int64):
        own = torch.full((2, 3), group.rank + 1).to(dtype)
        assert torch.equal(group.all_reduce(own.t().clone().t()), torch.full((2, 3), 6).to(dtype))
        sizes = [2, 0, 3]
        parts = [torch.full((2, size), rank).to(dtype) for rank, size in enumerate(sizes)]
        assert torch.equal(group.all_gather(parts[group.rank], sizes), torch.cat(parts, -1))
        assert group.all_gather(parts[1], [0, 0, 0]).shape == (2, 0)
        sent = torch.full((3, 2), group.rank).to(dtype).t()
        assert torch.equal(group.broadcast(sent, 2), torch.full((2, 3), 2).to(dtype))
    assert group.min_int(5 - group.rank) == 3
    group.barrier()


def digest_of_sums(group: TPGroup) -> str:
    digest = hashlib.sha256()
    generator = torch.Generator().manual_seed(group.rank)
    for num_elements in (1, 576, 4608, 100_003):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tensor = torch.randn(num_elements, generator=generator).to(dtype)
            digest.update(group.all_reduce(tensor).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(WORLD_SIZE)
    ]
    yield started
    for process in started:
        with process:
            process.kill()


def hear(process: subprocess.Popen[str]) -> dict[str, Any]:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, f"process {process.pid} ended with {process.wait()}"
    said: dict[str, Any] = json.loads(line)
    return said


def test_gloo_sums_gathers_and_broadcasts_and_notices_a_dead_rank(ranks: list[subprocess.Popen[str]]) -> None:
    assert len({hear(process)["digest"] for process in ranks}) == 1
    killed_s = time.monotonic()
    ranks[1].kill()
    for process in (ranks[0], ranks[2]):
        said = hear(process)
        assert said["error"] == "PeerLostError"
        assert said["time_s"] - killed_s < 1
        assert process.wait(10) == 0


if __name__ == "__main__":
    play_rank(int(sys.argv[1]), sys.argv[2])
