"""The group of one rank: identity at world size 1, clear errors without collectives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tprt.distributed.local import make_local_groups
from tprt.distributed.tp_group import TPGroup
from tprt.errors import TransportError, TransportTimeoutError


def test_at_world_size_1_every_collective_is_the_identity() -> None:
    group = TPGroup(0, 1)
    tensor = torch.randn(2, 3)
    copy = tensor.clone()
    assert group.all_reduce(tensor) is tensor
    assert group.all_gather(tensor, [3]) is tensor
    assert group.all_gather(tensor, [2], dim=0) is tensor
    assert group.broadcast(tensor, 0) is tensor
    assert torch.equal(tensor, copy)
    assert group.min_int(7) == 7
    group.barrier()
    group.close()
    assert group.collective_number == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda group: group.all_reduce(torch.ones(2)),
        lambda group: group.all_gather(torch.ones(2), [1, 2, 3]),
        lambda group: group.broadcast(torch.ones(2), 2),
        lambda group: group.min_int(1),
        lambda group: group.barrier(),
    ],
)
def test_a_group_without_collectives_exists_but_says_why_it_cannot_compute(
    call: Callable[[TPGroup], object],
) -> None:
    group = TPGroup(1, 3)
    assert (group.rank, group.world_size) == (1, 3)
    with pytest.raises(TransportError, match=r"rank 1 of 3.*without collectives"):
        call(group)
    group.close()


@pytest.mark.parametrize(("rank", "world_size"), [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_the_world_is_refused(rank: int, world_size: int) -> None:
    with pytest.raises(TransportError, match=f"rank {rank} of world size {world_size}"):
        TPGroup(rank, world_size)


@pytest.mark.parametrize("sizes", [[2], [2, 4], [3, 2, 1]])
def test_a_gather_whose_sizes_do_not_fit_is_refused_before_anyone_waits(sizes: list[int]) -> None:
    group = make_local_groups(2)[1]
    with pytest.raises(TransportError, match="one size per rank"):
        group.all_gather(torch.ones(1, 3), sizes)


def test_a_broadcast_from_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(TransportError, match="broadcast from rank 2"):
        make_local_groups(2)[0].broadcast(torch.ones(1), 2)


def test_the_collective_number_counts_what_a_rank_has_begun(run_ranks: Callable[..., list[object]]) -> None:
    def work(_: int, group: TPGroup) -> int:
        group.all_reduce(torch.ones(2))
        group.barrier()
        group.min_int(3)
        return group.collective_number

    assert run_ranks(make_local_groups(3), work) == [3, 3, 3]


class Witness:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.seen: list[tuple[object, ...]] = []

    def enter_layer(self, layer: int) -> None:
        self.seen.append(("layer", layer))

    def leave_layers(self) -> None:
        self.seen.append(("no layer",))

    def enter_collective(self, number: int, name: str) -> None:
        self.seen.append((number, name))

    def leave_collective(self) -> None:
        self.seen.append(("out",))


CALLS: dict[str, Callable[[TPGroup], object]] = {
    "all_reduce": lambda group: group.all_reduce(torch.ones(2)),
    "all_gather": lambda group: group.all_gather(torch.ones(2), [2, 2]),
    "broadcast": lambda group: group.broadcast(torch.ones(2), 0),
    "min_int": lambda group: group.min_int(1),
    "barrier": lambda group: group.barrier(),
}


def test_an_observer_is_told_of_the_way_into_and_out_of_every_collective(
    run_ranks: Callable[..., list[object]],
) -> None:
    def work(_: int, group: TPGroup) -> list[tuple[object, ...]]:
        witness = Witness()
        group.observer = witness
        for call in CALLS.values():
            call(group)
        return witness.seen

    expected = [entry for number, name in enumerate(CALLS, 1) for entry in ((number, name), ("out",))]
    assert run_ranks(make_local_groups(2), work) == [expected, expected]


def test_a_collective_that_fails_is_never_left() -> None:
    group, witness = make_local_groups(2, timeout_s=0.01)[0], Witness()
    group.observer = witness
    with pytest.raises(TransportTimeoutError):
        group.barrier()
    assert witness.seen == [(1, "barrier")]


def test_a_group_of_one_rank_calls_no_collective_and_tells_of_none() -> None:
    group, witness = TPGroup(0, 1), Witness()
    group.observer = witness
    group.all_reduce(torch.ones(2))
    group.barrier()
    assert witness.seen == []


def test_a_group_that_is_disjoined_for_a_while_gives_shapes_and_neither_sends_nor_counts() -> None:
    group = make_local_groups(2, timeout_s=0.01)[0]
    joined, tensor = group.collectives, torch.ones(3, 2)
    with group.disjoined():
        assert group.all_reduce(tensor) is tensor
        assert group.all_gather(tensor, [2, 5]).shape == (3, 7)
        assert group.all_gather(tensor.T, [2, 4], dim=0).shape == (6, 3)
        assert group.broadcast(tensor, 1) is tensor
        assert group.min_int(7) == 7
        group.barrier()
        group.close()
    assert group.collectives is joined
    assert group.collective_number == 0
    with pytest.raises(TransportTimeoutError):
        group.barrier()
