"""What sums and gathers by symm_mem must do, checked by real ranks on GPUs of their own or on a shared one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from launch.devices import choose_device, prepare_shared_memory
from tprt.config import ParallelConfig
from tprt.distributed.all_reduce_limits import NO_LIMIT, AllReduceLimits
from tprt.distributed.factory import GroupDeadlines, make_group
from tprt.distributed.symm_mem import HALF_BYTES, SymmMemCollectives
from tprt.distributed.tp_group import TPGroup
from tprt.distributed.tuning import tune_all_reduce
from tprt.errors import TransportError

ROOT = Path(__file__).parents[2]
ONE_SHOT, TWO_SHOT = AllReduceLimits(NO_LIMIT, NO_LIMIT), AllReduceLimits(0, NO_LIMIT)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Some are no multiple of what a thread reads, of a program's tile, or of a half.
SIZES = (1, 7, 576, 4608, 12_293, 32_768, 32_770, 100_003, HALF_BYTES // 2 + 24)


def parts_of(world_size: int, size: int, dtype: torch.dtype, seed: int) -> list[torch.Tensor]:
    """Return what each rank brings."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for _ in range(world_size)]


def folded(parts: list[torch.Tensor]) -> torch.Tensor:
    """Return the sum as CPU ranks make it: in rank order, in float32, rounded once."""
    total = parts[0].float()
    for part in parts[1:]:
        total = total + part.float()
    return total.to(parts[0].dtype)


def check_sums(group: TPGroup, collectives: SymmMemCollectives) -> None:
    cases = [(size, dtype, way) for size in SIZES for dtype in DTYPES for way in (ONE_SHOT, TWO_SHOT)]
    for seed, (size, dtype, way) in enumerate(cases):
        collectives.limits = way
        parts = parts_of(group.world_size, size, dtype, seed)
        # An odd number of elements into a buffer: no longer aligned for wide reads.
        for offset in (0, 3):
            tensor = torch.zeros(size + offset, dtype=dtype, device="cuda")[offset:].copy_(parts[group.rank])
            assert group.all_reduce(tensor) is tensor
            assert torch.equal(tensor.cpu(), folded(parts)), (size, dtype, way, offset)
    columns = torch.full((5, 6), float(group.rank + 1), device="cuda").t()
    assert group.all_reduce(columns).unique().tolist() == [sum(range(1, group.world_size + 1))]
    whole = torch.full((3,), group.rank + 1, device="cuda")
    assert group.all_reduce(whole).tolist() == [sum(range(1, group.world_size + 1))] * 3
    assert group.all_reduce(torch.empty(0, 4, device="cuda")).shape == (0, 4)


def check_gathers(group: TPGroup) -> None:
    for sizes in ([2, 0, 3], [576, 577, 100], [300_001, 200_000, 1]):
        for dtype in (torch.float64, torch.float16, torch.uint8):
            own = sizes[: group.world_size]
            parts = [torch.full((7, size), rank + 1).to(dtype) for rank, size in enumerate(own)]
            gathered = group.all_gather(parts[group.rank].cuda(), own)
            assert torch.equal(gathered.cpu(), torch.cat(parts, -1))
    large = torch.full((3, HALF_BYTES // 8), group.rank, dtype=torch.int32, device="cuda")
    gathered = group.all_gather(large, [large.shape[1]] * group.world_size)
    assert gathered.view(3, group.world_size, -1).unique(dim=-1)[0].flatten().tolist() == [
        *range(group.world_size)
    ]


def check_graphs(group: TPGroup, collectives: SymmMemCollectives) -> None:
    """Replay an odd number of collectives of all kinds and sizes, with eager ones between."""
    sizes, ways = (64, 5000, 70_000, 1 << 20, 33), (ONE_SHOT, TWO_SHOT)
    brought = [parts_of(group.world_size, size, torch.bfloat16, size) for size in sizes]
    own = [parts[group.rank].cuda() for parts in brought]
    sums = [torch.empty_like(part) for part in own]
    score = torch.full((4, 2), float(group.rank), dtype=torch.float64, device="cuda")

    def work() -> torch.Tensor:
        for number, (part, total) in enumerate(zip(own, sums, strict=True)):
            collectives.limits = ways[number % 2]
            group.all_reduce(total.copy_(part))
        return group.all_gather(score, [2] * group.world_size)

    work()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        gathered = work()
    for number in range(50):
        graph.replay()
        if number % 3 == 0:
            assert group.all_reduce(torch.ones(11, device="cuda")).tolist() == [group.world_size] * 11
        for parts, total in zip(brought, sums, strict=True):
            assert torch.equal(total.cpu(), folded(parts))
        assert gathered.view(4, -1, 2)[3, :, 1].tolist() == [*range(group.world_size)]
        for tensor in (*sums, gathered):
            tensor.zero_()


def check_races(group: TPGroup, collectives: SymmMemCollectives) -> None:
    """Sum tensors of random sizes both ways with nothing between that would keep the ranks together."""
    generator = torch.Generator().manual_seed(7)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for number in range(1000):
        size, way = torch.randint(1, 200_000, (2,), generator=generator).tolist()
        collectives.limits = (ONE_SHOT, TWO_SHOT)[way % 2]
        expected = sum(rank + number % 7 for rank in range(group.world_size))
        total = group.all_reduce(torch.full((size,), float(group.rank + number % 7), device="cuda"))
        wrong += (total != expected).sum()
    assert wrong.item() == 0


def check_limits(group: TPGroup, collectives: SymmMemCollectives, cache: Path) -> AllReduceLimits:
    """Return what is measured, and kept by rank 0."""
    tune_all_reduce(group, cache)
    found = collectives.limits
    # Once all ranks are here, rank 0 has written.
    group.barrier()
    (kept,) = cache.iterdir()
    before = kept.stat()
    collectives.limits = TWO_SHOT
    tune_all_reduce(group, cache)
    assert (collectives.limits, kept.stat()) == (found, before), "what is known is not measured again"
    group.barrier()
    return found


def play_rank(rank: int, world_size: int, folder: str) -> None:
    """Check everything on a device of this rank's own, or on one that it shares where there are too few."""
    prepare_shared_memory(ParallelConfig(allow_shared_gpu=True))
    chosen = choose_device("cuda", rank, world_size, allow_shared_gpu=True)
    deadlines = GroupDeadlines(60.0, 60.0)
    if chosen.any_shared:
        with pytest.raises(TransportError, match="nccl refuses ranks that share a CUDA device"):
            make_group("nccl", rank, world_size, chosen.device, make_folder(folder, "nccl"), deadlines)
    meeting = make_folder(folder, "symm_mem")
    group = make_group("symm_mem", rank, world_size, chosen.device, meeting, deadlines)
    collectives = group.collectives
    assert isinstance(collectives, SymmMemCollectives)
    assert group.capturable
    assert collectives.group.capturable == (not chosen.any_shared)
    found = check_limits(group, collectives, Path(folder) / "cache")
    check_sums(group, collectives)
    check_gathers(group)
    check_graphs(group, collectives)
    check_races(group, collectives)
    assert group.min_int(5 - rank) == 6 - world_size
    sent = torch.full((3,), rank, device=chosen.device)
    assert group.broadcast(sent, 1).tolist() == [1] * 3
    group.barrier()
    group.close()
    print(json.dumps(asdict(found)), flush=True)


def make_folder(folder: str, name: str) -> str:
    path = Path(folder) / name
    path.mkdir(exist_ok=True)
    return str(path)


def run_checks(folder: Path, world_size: int) -> AllReduceLimits:
    """Run `play_rank` in a process for each rank; return the limits that all of them have found."""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    command = [sys.executable, "-m", "tests.support.symm_mem_checks"]
    started = [
        subprocess.Popen(
            [*command, str(rank), str(world_size), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]
    try:
        said = [process.communicate(timeout=100)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    assert [process.returncode for process in started] == [0] * world_size, "\n".join(said)
    (limits,) = {text.splitlines()[-1] for text in said}
    return AllReduceLimits(**json.loads(limits))


if __name__ == "__main__":
    play_rank(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
