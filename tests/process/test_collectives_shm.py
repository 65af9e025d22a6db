"""Shared memory collectives between real processes: exact on 2 to 5 ranks, and quick to name who is lost."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tprt.distributed.factory import GroupDeadlines, make_group
from tprt.distributed.tp_group import TPGroup
from tprt.errors import TransportError

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]
SHAPES = [(576,), (8, 576), (1,), (3, 5, 7), (0, 4), (70_001,), (3, 120_000)]
# Far from the deadlines that would end a wait for a dead rank, and no short time for a busy machine.
PROMPT_S = 20.0


# What a rank does, in a process of its own.


def play_rank(rank: int, world_size: int, run_dir: str, scenario: str) -> None:
    torch.set_num_threads(1)
    {"exact": play_exact, "lose": play_lose}[scenario](rank, world_size, run_dir)


def play_exact(rank: int, world_size: int, run_dir: str) -> None:
    """Check every world size up to this one, rank by rank, then that nothing is left."""
    say(done="import")
    before = list_descriptors()
    for size in range(max(2, rank + 1), world_size + 1):
        group = make_group("shm", rank, size, CPU, make_dir(run_dir, size), GroupDeadlines(60.0, 60.0))
        for dtype in DTYPES:
            for shape in SHAPES:
                check_collectives(group, shape, dtype)
        assert group.min_int(100 - rank) == 101 - size
        group.barrier()
        group.close()
        say(done=size)
    left = [path for path in list_descriptors() if path not in before]
    say(left=left, mapped="tprt-collectives" in Path("/proc/self/maps").read_text())


def make_dir(run_dir: str, size: int) -> str:
    path = os.path.join(run_dir, str(size))
    os.makedirs(path, exist_ok=True)
    return path


def list_descriptors() -> list[str]:
    """Return what this process's descriptors are, but for that of the listing itself."""
    paths = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")]
    return sorted(os.readlink(path) for path in paths if os.path.exists(path))


def input_of(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * rank + sum(shape))
    values = torch.randn(shape, generator=generator) * 100.0 ** (rank % 3)
    return values.to(dtype)


def check_collectives(group: TPGroup, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Compare with the fold in rank order, which each rank computes alone: equal there is equal everywhere."""
    inputs = [input_of(rank, shape, dtype) for rank in range(group.world_size)]
    total = inputs[0].float() if dtype in (torch.bfloat16, torch.float16) else inputs[0].clone()
    for other in inputs[1:]:
        total += other
    own = inputs[group.rank]
    assert torch.equal(group.all_reduce(own.clone()), total.to(dtype))
    sizes = [rank % 3 * shape[-1] for rank in range(group.world_size)]
    wide = [torch.cat([tensor] * 2, -1)[..., :size] for tensor, size in zip(inputs, sizes, strict=True)]
    assert torch.equal(group.all_gather(wide[group.rank], sizes), torch.cat(wide, -1))
    src = group.world_size - 1
    assert torch.equal(group.broadcast(own.clone(), src), inputs[src])


def play_lose(rank: int, world_size: int, run_dir: str) -> None:
    """Sum until a peer is stopped, then, in a new group, until a peer is dead."""
    for number, step_timeout_s in ((1, 1.0), (2, 60.0)):
        deadlines = GroupDeadlines(60.0, step_timeout_s)
        group = make_group("shm", rank, world_size, CPU, make_dir(run_dir, number), deadlines)
        say(done=f"group {number}")
        tensor = torch.ones(576)
        try:
            while True:
                group.all_reduce(tensor.fill_(1.0))
        except TransportError as error:
            say(error=type(error).__name__, message=str(error), time_s=time.monotonic())
        group.close()
        sys.stdin.readline()


def say(**fields: object) -> None:
    print(json.dumps(fields), flush=True)


# The tests.


class Rank:
    """A child that plays one rank."""

    def __init__(self, rank: int, world_size: int, run_dir: Path, scenario: str) -> None:
        command = [sys.executable, __file__, str(rank), str(world_size), str(run_dir), scenario]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"process {self.process.pid} ended with {self.process.wait()}"
        said: dict[str, Any] = json.loads(line)
        return said

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()


@pytest.fixture
def start_ranks(tmp_path: Path) -> Iterator[Any]:
    started: list[Rank] = []

    def start(world_size: int, scenario: str) -> list[Rank]:
        started.extend(Rank(rank, world_size, tmp_path, scenario) for rank in range(world_size))
        return started

    yield start
    for rank in started:
        with rank.process as process:
            process.kill()


@pytest.mark.timeout(400)
def test_2_to_5_ranks_get_the_exact_fold_and_leave_nothing_behind(start_ranks: Any) -> None:
    ranks = start_ranks(5, "exact")
    for number, rank in enumerate(ranks):
        assert rank.hear() == {"done": "import"}
        for size in range(max(2, number + 1), 6):
            assert rank.hear() == {"done": size}
        assert rank.hear() == {"left": [], "mapped": False}
        assert rank.process.wait(PROMPT_S) == 0


def test_a_stopped_rank_is_named_at_the_deadline_and_a_killed_one_at_once(start_ranks: Any) -> None:
    ranks = start_ranks(3, "lose")
    for rank in ranks:
        assert rank.hear() == {"done": "group 1"}
    time.sleep(0.1)
    stopped_s = time.monotonic()
    ranks[1].process.send_signal(signal.SIGSTOP)
    for survivor in (ranks[0], ranks[2]):
        said = survivor.hear()
        assert said["error"] == "TransportTimeoutError"
        assert f"for rank 1 (process {ranks[1].process.pid}, stopped by a signal)" in said["message"]
        assert "whose last collective was" in said["message"]
        assert 0.9 < said["time_s"] - stopped_s < PROMPT_S
    ranks[1].process.send_signal(signal.SIGCONT)
    assert ranks[1].hear()["error"]  # its peers have given up

    for rank in ranks:
        rank.go_on()
    for rank in ranks:
        assert rank.hear() == {"done": "group 2"}
    time.sleep(0.1)
    killed_s = time.monotonic()
    ranks[2].process.kill()
    for survivor in ranks[:2]:
        said = survivor.hear()
        assert said["error"] == "PeerLostError"
        assert f"rank 2 (process {ranks[2].process.pid}) is dead" in said["message"]
        assert said["time_s"] - killed_s < PROMPT_S


if __name__ == "__main__":
    play_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
