"""What is left for KV blocks is what the limit, others, weights and the measured workspace leave."""

from __future__ import annotations

import pytest
import torch

from tprt.errors import ConfigError
from tprt.worker.memory_budget import CudaMemory, MemoryBudget, measure_budget

CONTEXT, OTHER_PROGRAM, NCCL = 500, 300, 70


class SimulatedMemory:
    """A device of 10,000 bytes, with an allocator that rounds up to 100 and keeps what is freed."""

    def __init__(self) -> None:
        self.total = 10_000
        self.outside = CONTEXT + OTHER_PROGRAM
        self.tensors = self.top = 0
        self.kept = 0

    def change(self, num_bytes: int) -> None:
        self.tensors += num_bytes
        if self.tensors > self.total - self.outside:
            raise torch.OutOfMemoryError
        self.top = max(self.top, self.tensors)
        self.kept = max(self.kept, -(-self.tensors // 100) * 100)

    def free_and_total(self) -> tuple[int, int]:
        return self.total - self.outside - self.kept, self.total

    def settled(self) -> tuple[int, int]:
        return self.free_and_total()

    def reserved(self) -> int:
        return self.kept

    def allocated(self) -> int:
        return self.tensors

    def start_peak(self) -> None:
        self.top = self.tensors

    def peak(self) -> int:
        return self.top

    def release_unused(self) -> None:
        self.kept = -(-self.tensors // 100) * 100


def test_the_workspace_is_the_peak_of_the_step_and_others_include_what_it_made_libraries_take() -> None:
    memory = SimulatedMemory()
    memory.change(+5000)  # the loader's staging, long gone
    memory.change(-5000)
    memory.change(+2050)

    def run_step() -> None:
        memory.change(+900)
        memory.change(-700)
        memory.change(+100)
        memory.outside += NCCL
        memory.change(-300)

    budget = measure_budget(memory, 0.9, run_step)
    assert budget == MemoryBudget(
        total=10_000, limit=9000, others=CONTEXT + OTHER_PROGRAM + NCCL, weights=2100, workspace=900
    )
    assert budget.available == 9000 - 870 - 2100 - 900
    assert budget.num_blocks(100) == 51


def test_a_step_that_does_not_fit_is_refused_with_what_to_change() -> None:
    memory = SimulatedMemory()
    memory.change(9000)
    with pytest.raises(ConfigError, match=r"lower scheduler.max_num_batched_tokens and scheduler.max_num_seqs"):
        measure_budget(memory, 0.9, lambda: memory.change(500))


def test_ranks_that_share_a_device_divide_what_is_left_equally(monkeypatch: pytest.MonkeyPatch) -> None:
    total, context, held = 10_000, 100, (3000, 1000)
    free = total - 2 * context - sum(held)
    calls: list[str] = []

    def ask(device: torch.device) -> tuple[int, int]:
        calls.append("ask")
        return free, total

    monkeypatch.setattr(torch.cuda, "mem_get_info", ask)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    left = []
    for size in held:
        for name in ("memory_reserved", "memory_allocated", "max_memory_allocated"):
            monkeypatch.setattr(torch.cuda, name, lambda device, size=size: size)
        calls.clear()
        memory = CudaMemory(torch.device("cuda", 0), 2, lambda: calls.append("meet"))
        budget = measure_budget(memory, 0.9, lambda: None)
        assert calls == ["meet", "ask", "meet"]
        assert (budget.total, budget.limit, budget.weights) == (total // 2, total * 9 // 20, size)
        left.append(budget.available)
    assert left == [(total * 9 // 10 - 2 * context - sum(held)) // 2] * 2


def test_no_block_fits_where_the_rest_takes_more_than_the_limit() -> None:
    budget = MemoryBudget(total=100, limit=90, weights=95)
    assert budget.available == -5
    assert budget.num_blocks(1) == 0


def test_the_rows_of_the_table_add_up_to_the_total() -> None:
    mib = 2**20
    budget = MemoryBudget(90 * mib, 80 * mib, others=5 * mib, weights=30 * mib, workspace=7 * mib, graphs=mib)
    rows = {line[:17].strip(): line[17:].split() for line in budget.table(kv_bytes=20 * mib)}
    assert {name: float(size) for name, (size, unit) in rows.items()} == {
        "total": 90,
        "in use by others": 5,
        "weights": 30,
        "workspace": 7,
        "CUDA graphs": 1,
        "KV blocks": 20,
        "left over": 27,
    }
    assert {unit for _, unit in rows.values()} == {"MiB"}
