"""A request goes where it costs least: to its prefix, unless that replica is much busier than another."""

from __future__ import annotations

from collections import Counter

import pytest

from tprt.server import prefix_index
from tprt.server.prefix_index import PrefixIndex
from tprt.server.replica_router import COMPUTE_WEIGHT, ReplicaRouter, ReplicaState

BLOCK = 16
NUM_BLOCKS = 1000


@pytest.fixture
def router() -> ReplicaRouter:
    return make_router(2)


def make_router(num_replicas: int, num_blocks: int = NUM_BLOCKS, caches_prefixes: bool = True) -> ReplicaRouter:
    made = ReplicaRouter(num_replicas, BLOCK, caches_prefixes)
    for replica in range(num_replicas):
        made.serves(replica, num_blocks)
    return made


def send(router: ReplicaRouter, tokens: list[int], *loads: int) -> int:
    return router.choose(router.hash_tokens(tokens), len(tokens), loads)


def prompt(name: int, num_tokens: int) -> list[int]:
    """A prompt that shares no block with one of another name."""
    return [name, *range(num_tokens - 1)]


def test_requests_with_one_prefix_go_to_one_replica(router: ReplicaRouter) -> None:
    shared = prompt(1, 10 * BLOCK)
    first = send(router, [*shared, 1], 0, 0)
    loads = [0, 0]
    loads[first] = 8 * len(shared)
    assert {send(router, [*shared, last], *loads) for last in range(2, 9)} == {first}


def test_the_longest_prefix_wins(router: ReplicaRouter) -> None:
    short = send(router, prompt(1, 2 * BLOCK), 0, 0)
    conversation = prompt(1, 8 * BLOCK)
    other = 1 - short
    router.note(other, router.hash_tokens(conversation))
    assert send(router, [*conversation, 7], 0, 0) == other


def test_new_prompts_go_to_the_replica_with_the_least_load(router: ReplicaRouter) -> None:
    assert send(router, prompt(1, 50), 100, 99) == 1
    assert send(router, prompt(2, 50), 99, 100) == 0


def test_equal_replicas_take_turns() -> None:
    router = make_router(3)
    taken = [send(router, prompt(name, 50), 0, 0, 0) for name in range(6)]
    assert taken[:3] == taken[3:]
    assert sorted(taken[:3]) == [0, 1, 2]


def test_a_prefix_is_computed_elsewhere_once_its_replica_is_too_busy(router: ReplicaRouter) -> None:
    shared = prompt(1, 10 * BLOCK)
    router.note(0, router.hash_tokens(shared))
    worth = COMPUTE_WEIGHT * len(shared)
    assert send(router, [*shared, 1], worth - 1, 0) == 0
    assert send(router, [*shared, 2], worth + 1, 0) == 1
    # now both have it, and load alone decides
    assert send(router, [*shared, 3], 10, 20) == 0
    assert send(router, [*shared, 4], 20, 10) == 1


def test_a_prefix_of_one_block_does_not_draw_everything_to_one_replica(router: ReplicaRouter) -> None:
    template = list(range(BLOCK))
    loads = [0, 0]
    for name in range(1000, 1100):
        tokens = [*template, *prompt(name, 10 * BLOCK)]
        loads[send(router, tokens, *loads)] += len(tokens)
    assert abs(loads[0] - loads[1]) <= COMPUTE_WEIGHT * BLOCK + 11 * BLOCK


def test_blocks_that_a_replica_has_given_up_are_forgotten() -> None:
    router = make_router(2, num_blocks=20)
    shared = prompt(1, 10 * BLOCK)
    router.note(0, router.hash_tokens(shared))
    router.note(0, router.hash_tokens(prompt(2, 20 * BLOCK)))
    assert send(router, [*shared, 1], 1, 0) == 1


def test_without_a_prefix_cache_load_alone_decides() -> None:
    router = make_router(2, caches_prefixes=False)
    shared = prompt(1, 10 * BLOCK)
    first = send(router, shared, 0, 0)
    assert router.hash_tokens(shared) == []
    assert send(router, shared, *((1, 0) if first == 0 else (0, 1))) == 1 - first


def test_a_replica_that_is_replaced_gets_nothing_until_it_serves_and_has_lost_its_prefixes(
    router: ReplicaRouter,
) -> None:
    shared = prompt(1, 10 * BLOCK)
    router.note(0, router.hash_tokens(shared))
    router.is_replaced(0)
    assert send(router, [*shared, 1], 0, 10**6) == 1
    router.serves(0, NUM_BLOCKS)
    assert router.state(0) is ReplicaState.SERVING
    assert send(router, [*shared, 2], 1, 0) == 1
    assert send(router, prompt(2, 50), 0, 1) == 0


def test_requests_wait_at_a_replica_that_is_replaced_when_no_other_serves(router: ReplicaRouter) -> None:
    router.is_lost(0)
    router.is_replaced(1)
    assert send(router, prompt(1, 50), 0, 10**6) == 1


def test_a_lost_replica_gets_nothing(router: ReplicaRouter) -> None:
    router.is_lost(1)
    taken = Counter(send(router, prompt(name, 50), 10**6, 0) for name in range(5))
    assert taken == {0: 5}


def test_an_index_keeps_as_many_blocks_as_there_is_room_for_and_the_beginning_longest(
    router: ReplicaRouter, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashes = router.hash_tokens(prompt(1, 10 * BLOCK))
    index = PrefixIndex()
    index.add(hashes)
    assert len(index) == 0, "there is no room yet"
    index.resize(4)
    index.add(hashes)
    assert (len(index), index.count_known(hashes)) == (4, 4)
    monkeypatch.setattr(prefix_index, "MAX_BLOCKS", 3)
    index.resize(NUM_BLOCKS)
    assert index.count_known(hashes) == 3


def test_a_prefix_that_is_used_again_is_kept_longer_than_one_that_is_not(router: ReplicaRouter) -> None:
    old, new, other = (router.hash_tokens(prompt(name, 2 * BLOCK)) for name in (1, 2, 3))
    index = PrefixIndex()
    index.resize(4)
    for hashes in (old, new, old, other):
        index.add(hashes)
    assert [index.count_known(hashes) for hashes in (old, new, other)] == [2, 0, 2]


def test_hashes_of_output_go_on_from_those_of_the_prompt(router: ReplicaRouter) -> None:
    tokens = prompt(1, 3 * BLOCK)
    assert router.hash_tokens(tokens, router.hash_tokens(tokens[: BLOCK + 3])) == router.hash_tokens(tokens)
