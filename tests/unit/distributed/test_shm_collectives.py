"""Shared memory collectives, played by threads: the same bits as the fold in rank order, whatever the shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tprt.distributed import shm_collectives
from tprt.distributed.local import make_local_groups
from tprt.distributed.shm_collectives import ShmCollectives
from tprt.distributed.shm_memory import ShmGroupMemory
from tprt.distributed.tp_group import Collectives
from tprt.errors import PeerLostError, TransportError, TransportTimeoutError

RunRanks = Callable[..., list[Any]]
MakeEnds = Callable[..., list[ShmCollectives]]

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
SLOT_BYTES = 4096  # the least there is: 1,024 floats, so that small tests have many chunks


def make_tensor(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    if dtype.is_floating_point:
        return (torch.randn(shape, generator=generator) * 10.0 ** (rank % 4)).to(dtype)
    return torch.randint(0, 100, shape, generator=generator).to(dtype)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def run_like_local(run_ranks: RunRanks, ends: list[ShmCollectives], call: Callable[..., Tensor]) -> None:
    """Run `call(rank, collectives)` on shared memory and on threads; all results must have the same bits."""
    expected = run_ranks(make_local_groups(len(ends)), call)
    found = run_ranks(ends, call)
    for tensor in found:
        assert tensor.shape == expected[0].shape
        assert tensor.dtype == expected[0].dtype
        assert bits(tensor) == bits(expected[0])


@pytest.mark.parametrize("world_size", [2, 3, 5, 8])
@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=str)
def test_a_sum_has_the_bits_of_the_fold_in_rank_order(
    world_size: int, dtype: torch.dtype, make_shm_ends: MakeEnds, run_ranks: RunRanks
) -> None:
    ends = make_shm_ends(world_size, SLOT_BYTES)
    for num_elements in (1, 7, 576, 4096 // dtype.itemsize, 4096 // dtype.itemsize + 1, 10_007):
        run_like_local(
            run_ranks, ends, lambda rank, end, n=num_elements: end.all_reduce(make_tensor(rank, (n,), dtype))
        )


@pytest.mark.parametrize("one_shot_bytes", [0, 1 << 20])
def test_one_shot_and_two_shot_sums_have_the_same_bits(
    one_shot_bytes: int, make_shm_ends: MakeEnds, run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm_collectives, "_ONE_SHOT_BYTES", one_shot_bytes)
    ends = make_shm_ends(3, 1 << 20)
    for dtype in FLOATS:
        run_like_local(
            run_ranks, ends, lambda rank, end, d=dtype: end.all_reduce(make_tensor(rank, (5, 577), d))
        )


@pytest.mark.parametrize("num_rows", [3, 3000])
def test_a_tensor_that_is_not_contiguous_is_summed_in_place(
    num_rows: int, make_shm_ends: MakeEnds, run_ranks: RunRanks
) -> None:
    def work(rank: int, end: Collectives) -> Tensor:
        whole = make_tensor(rank, (num_rows, 8), torch.float32)
        columns = whole[:, 1:3]
        assert end.all_reduce(columns) is columns
        return whole[:, 1:3].clone()

    ends = make_shm_ends(2, SLOT_BYTES)
    run_like_local(run_ranks, ends, work)
    run_like_local(
        run_ranks, ends, lambda rank, end: end.all_reduce(make_tensor(rank, (40, 50), torch.float32).t())
    )


def test_what_is_beside_a_strided_sum_stays_as_it_was(make_shm_ends: MakeEnds, run_ranks: RunRanks) -> None:
    def work(rank: int, end: Collectives) -> list[float]:
        whole = torch.full((3000, 3), float(rank + 1))
        end.all_reduce(whole[:, 1])
        return [whole[:, column].unique().tolist() for column in range(3)]

    assert run_ranks(make_shm_ends(2, SLOT_BYTES), work) == [[[1], [3], [1]], [[2], [3], [2]]]


def test_empty_and_zero_dimensional_tensors_are_summed(make_shm_ends: MakeEnds, run_ranks: RunRanks) -> None:
    ends = make_shm_ends(3)
    run_like_local(run_ranks, ends, lambda rank, end: end.all_reduce(torch.empty(0, 4)))
    run_like_local(run_ranks, ends, lambda rank, end: end.all_reduce(torch.tensor(float(rank))))


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.integers(0, 400), min_size=2, max_size=5),
    num_rows=st.integers(1, 9),
    dim=st.sampled_from([0, 1, -1, -2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_uneven_gathers_equal_a_concatenation(
    sizes: list[int],
    num_rows: int,
    dim: int,
    dtype: torch.dtype,
    make_shm_ends: MakeEnds,
    run_ranks: RunRanks,
) -> None:
    shapes = [(size, num_rows) if dim in (0, -2) else (num_rows, size) for size in sizes]
    inputs = [make_tensor(rank, shape, dtype) for rank, shape in enumerate(shapes)]
    ends = make_shm_ends(len(sizes), SLOT_BYTES)
    for gathered in run_ranks(ends, lambda rank, end: end.all_gather(inputs[rank], sizes, dim)):
        assert torch.equal(gathered, torch.cat(inputs, dim))


def test_a_strided_tensor_is_gathered(make_shm_ends: MakeEnds, run_ranks: RunRanks) -> None:
    def work(rank: int, end: Collectives) -> Tensor:
        return end.all_gather(make_tensor(rank, (600, 4), torch.float32).t()[:3], [600, 600], dim=1)

    run_like_local(run_ranks, make_shm_ends(2, SLOT_BYTES), work)


@pytest.mark.parametrize("shape", [(3,), (3000, 3), (0,)])
def test_a_broadcast_brings_the_source_to_all_ranks(
    shape: tuple[int, ...], make_shm_ends: MakeEnds, run_ranks: RunRanks
) -> None:
    ends = make_shm_ends(3, SLOT_BYTES)
    for src in range(3):
        run_like_local(
            run_ranks, ends, lambda rank, end, s=src: end.broadcast(make_tensor(rank, shape, torch.float16), s)
        )
    run_like_local(
        run_ranks, ends, lambda rank, end: end.broadcast(make_tensor(rank, (60, 70), torch.bool).t(), 2)
    )


def test_the_minimum_is_that_of_all_ranks(make_shm_ends: MakeEnds, run_ranks: RunRanks) -> None:
    values = [2**40, -(2**50), 3]
    assert run_ranks(make_shm_ends(3), lambda rank, end: end.min_int(values[rank])) == [-(2**50)] * 3


def test_collectives_of_all_kinds_may_follow_each_other_in_any_order(
    make_shm_ends: MakeEnds, run_ranks: RunRanks
) -> None:
    def work(rank: int, end: Collectives) -> Tensor:
        results = []
        for number in range(40):
            shape = (1 + number * 373 % 5000,)
            results.append(end.all_reduce(make_tensor(rank + number, shape, torch.float32)))
            if number % 3 == 0:
                end.barrier()
            if number % 4 == 1:
                results.append(
                    end.all_gather(
                        make_tensor(rank, (900 * rank + number,), torch.float32),
                        [900 * peer + number for peer in range(3)],
                    )
                )
            if number % 5 == 2:
                results.append(end.broadcast(make_tensor(rank, (2000,), torch.float32), number % 3))
        return torch.cat(results)

    run_like_local(run_ranks, make_shm_ends(3, SLOT_BYTES), work)


def test_a_group_that_was_made_in_inference_mode_works_outside_of_it_and_back(
    make_shm_ends: MakeEnds, run_ranks: RunRanks
) -> None:
    with torch.inference_mode():
        ends = make_shm_ends(2)

    def work(rank: int, end: Collectives) -> list[float]:
        sums = []
        for inference in (True, False, True):
            with torch.inference_mode(inference):
                sums.append(end.all_reduce(torch.full((3,), float(rank + 1)))[0].item())
        return sums

    assert run_ranks(ends, work) == [[3.0] * 3] * 2


def test_the_cache_of_views_is_bounded(
    make_shm_ends: MakeEnds, run_ranks: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shm_collectives, "_MAX_CACHED_VIEWS", 4)
    ends = make_shm_ends(2)
    for size in range(1, 11):
        run_like_local(
            run_ranks, ends, lambda rank, end, n=size: end.all_reduce(make_tensor(rank, (n,), torch.float32))
        )
    assert all(0 < len(end._message_views) <= 4 for end in ends)


def test_ranks_that_make_different_calls_are_told_what_each_does(
    make_shm_ends: MakeEnds, run_ranks: RunRanks
) -> None:
    def work(rank: int, end: Collectives) -> str:
        with pytest.raises(TransportError, match="diverged") as caught:
            end.all_reduce(torch.ones(576 + rank))
        return str(caught.value)

    for message in run_ranks(make_shm_ends(2), work):
        assert "all_reduce of 576 x float32" in message
        assert "all_reduce of 577 x float32" in message


def test_a_rank_that_does_not_come_is_named_at_the_deadline_and_the_group_is_unusable(
    make_shm_ends: MakeEnds,
) -> None:
    end = make_shm_ends(3, timeout_s=0.05)[1]
    with pytest.raises(
        TransportTimeoutError, match=r"rank 1 .*0\.05 s in collective 1 for rank 0 .* and rank 2 "
    ):
        end.all_reduce(torch.ones(2))
    with pytest.raises(TransportError, match="cannot use this group any more"):
        end.barrier()


def test_a_rank_that_closes_is_lost_to_those_who_wait_for_it(
    make_shm_ends: MakeEnds, run_ranks: RunRanks
) -> None:
    def work(rank: int, end: ShmCollectives) -> None:
        end.all_reduce(torch.ones(2))
        if rank == 1:
            end.close()
            end.close()
            return
        with pytest.raises(
            PeerLostError, match=r"rank 1 .*closed the group; rank \d .* collective 2, its last one was 1"
        ):
            end.all_reduce(torch.ones(2))

    run_ranks(make_shm_ends(3, timeout_s=60), work)


def test_a_closed_group_says_so(make_shm_ends: MakeEnds) -> None:
    end = make_shm_ends(2)[0]
    end.close()
    with pytest.raises(TransportError, match="it was closed"):
        end.all_reduce(torch.ones(2))


def test_memory_of_another_world_size_is_refused(no_descriptor_is_left: None) -> None:
    memory = ShmGroupMemory.create(3)
    with pytest.raises(TransportError, match="world size 2 got shared memory for 3 ranks"):
        ShmCollectives(0, 2, memory, 1.0)
    memory.close()


def test_a_type_that_cannot_be_summed_is_refused_by_name(make_shm_ends: MakeEnds) -> None:
    with pytest.raises(TransportError, match=r"complex64: expected one of float32, bfloat16"):
        make_shm_ends(2)[0].all_reduce(torch.ones(2, dtype=torch.complex64))
