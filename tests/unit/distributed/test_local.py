"""Thread collectives: what the other tests compare with, so checked against plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tprt.distributed.local import make_local_groups
from tprt.distributed.tp_group import TPGroup
from tprt.errors import PeerLostError, TransportError, TransportTimeoutError

RunRanks = Callable[..., list[Any]]


def test_the_sum_is_a_fold_in_rank_order(run_ranks: RunRanks) -> None:
    values = [1e8, 1.0, -1e8, 1.0]
    sums = run_ranks(
        make_local_groups(4), lambda rank, group: group.all_reduce(torch.tensor([values[rank]])).item()
    )
    assert sums == [1.0] * 4  # (1e8 + 1) loses the 1 in float32; any other order gives 0 or 2


def test_16_bit_floats_are_summed_in_float32(run_ranks: RunRanks) -> None:
    values = [256.0, 1.0, 1.0]

    def work(rank: int, group: TPGroup) -> float:
        return float(group.all_reduce(torch.tensor([values[rank]], dtype=torch.bfloat16)))

    assert run_ranks(make_local_groups(3), work) == [258.0] * 3  # bfloat16 has 8 bits: 256 + 1 + 1 is 256 in it


def test_gather_broadcast_min_and_barrier_agree_on_all_ranks(run_ranks: RunRanks) -> None:
    def work(rank: int, group: TPGroup) -> tuple[list[float], float, int]:
        gathered = group.all_gather(torch.full((1, rank), float(rank)), [0, 1, 2])
        sent = group.broadcast(torch.tensor(float(rank)), 1)
        group.barrier()
        return gathered.flatten().tolist(), sent.item(), group.min_int(10 - rank)

    assert run_ranks(make_local_groups(3), work) == [([1.0, 2.0, 2.0], 1.0, 8)] * 3


def test_a_rank_that_does_not_come_is_named_at_the_deadline() -> None:
    groups = make_local_groups(3, timeout_s=0.05)
    with pytest.raises(TransportTimeoutError, match="for rank 1, 2"):
        groups[0].barrier()


def test_a_rank_that_has_left_is_named_at_once() -> None:
    groups = make_local_groups(2, timeout_s=60)
    groups[1].close()
    with pytest.raises(PeerLostError, match="rank 1 has closed"):
        groups[0].barrier()


def test_ranks_that_make_different_calls_are_told(run_ranks: RunRanks) -> None:
    def work(rank: int, group: TPGroup) -> None:
        call = group.barrier if rank else lambda: group.all_reduce(torch.ones(1))
        with pytest.raises(TransportError, match="diverged: they are in all_reduce, barrier"):
            call()

    run_ranks(make_local_groups(2), work)
