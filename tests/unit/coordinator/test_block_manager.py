from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tprt.block_hash import NO_PARENT, hash_block
from tprt.coordinator.block_manager import BlockManager


def chain(*blocks: str) -> list[bytes]:
    """Hashes of a chain of blocks whose tokens are given as text."""
    hashes: list[bytes] = []
    for text in blocks:
        hashes.append(hash_block(hashes[-1] if hashes else NO_PARENT, text.encode()))
    return hashes


def fill(manager: BlockManager, hashes: list[bytes]) -> list[int]:
    """Let a sequence compute and free a chain; return its blocks."""
    blocks = manager.allocate([], len(hashes))
    for block, value in zip(blocks, hashes, strict=True):
        manager.register(block, value)
    manager.free(np.array(blocks, np.int32))
    manager.check()
    return blocks


def test_the_hash_of_a_block_depends_on_its_tokens_and_on_all_blocks_before_it() -> None:
    assert chain("a", "b")[1] != chain("c", "b")[1]
    assert chain("a", "b")[1] != chain("a", "c")[1]
    assert chain("a", "b") == chain("a", "b")


def test_the_hash_of_a_block_is_the_same_in_every_process() -> None:
    known = "30c050e1abfada094f67c47276403c465dcca744b983b404f18b53d91ea33963"
    assert hash_block(NO_PARENT, np.arange(16, dtype=np.int32).tobytes()).hex() == known


def test_a_hit_on_a_cached_free_block_takes_it_out_of_the_free_ones() -> None:
    manager = BlockManager(4, True)
    blocks = fill(manager, chain("a", "b"))
    assert manager.num_free == 4
    hits = manager.find_cached(chain("a", "b", "c"))
    assert hits == blocks
    assert manager.allocate(hits, 1)[:2] == blocks
    assert (manager.num_free, manager.num_used) == (1, 3)
    manager.check()


def test_a_hit_on_a_used_block_is_shared_until_the_last_holder_frees_it() -> None:
    manager = BlockManager(4, True)
    first = manager.allocate([], 1)
    manager.register(first[0], chain("a")[0])
    second = manager.allocate(manager.find_cached(chain("a")), 0)
    assert second == first
    assert manager.reference_counts[first[0]] == 2
    manager.free(np.array(first, np.int32))
    assert manager.num_used == 1
    manager.free(np.array(second, np.int32))
    assert manager.num_used == 0
    manager.check()


def test_cached_free_blocks_do_not_count_twice_in_can_allocate() -> None:
    manager = BlockManager(4, True)
    fill(manager, chain("a", "b"))
    hits = manager.find_cached(chain("a", "b"))
    assert manager.can_allocate(hits, 2)
    assert not manager.can_allocate(hits, 3)


def test_blocks_that_cache_nothing_are_taken_before_those_that_do() -> None:
    manager = BlockManager(4, True)
    cached = fill(manager, chain("a", "b"))
    assert not set(manager.append(2)) & set(cached)
    assert manager.find_cached(chain("a", "b")) == cached


def test_the_chain_freed_longest_ago_is_evicted_first_and_its_tail_before_its_head() -> None:
    manager = BlockManager(6, True)
    old, new = fill(manager, chain("a", "b", "c")), fill(manager, chain("x", "y", "z"))
    manager.append(1)
    assert manager.find_cached(chain("a", "b", "c")) == old[:2]
    manager.append(2)
    assert manager.find_cached(chain("a", "b", "c")) == []
    assert manager.find_cached(chain("x", "y", "z")) == new
    manager.append(1)
    assert manager.find_cached(chain("x", "y", "z")) == new[:2]
    manager.check()


def test_a_chain_that_was_used_again_is_evicted_after_one_that_was_not() -> None:
    manager = BlockManager(4, True)
    first, second = fill(manager, chain("a", "b")), fill(manager, chain("x", "y"))
    manager.free(np.array(manager.allocate(manager.find_cached(chain("a", "b")), 0), np.int32))
    assert set(manager.append(2)) == set(second)
    assert manager.find_cached(chain("a", "b")) == first


def test_of_two_blocks_with_the_same_tokens_only_one_is_found_and_neither_is_lost() -> None:
    manager = BlockManager(3, True)
    first, second = manager.allocate([], 2)
    manager.register(first, chain("a")[0])
    manager.register(second, chain("a")[0])
    assert manager.find_cached(chain("a")) == [first]
    manager.free(np.array([first], np.int32))
    manager.free(np.array([second], np.int32))
    manager.check()
    assert manager.num_free == 3
    assert first not in manager.append(2)


def test_nothing_is_found_when_prefix_caching_is_off() -> None:
    manager = BlockManager(4, False)
    assert manager.find_cached(chain("a")) == []


def test_freeing_a_block_twice_is_our_own_bug() -> None:
    manager = BlockManager(4, True)
    blocks = np.array(manager.append(1), np.int32)
    manager.free(blocks)
    with pytest.raises(AssertionError, match="freed twice"):
        manager.free(blocks)


operations = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5), st.integers(0, 3)), max_size=60
)


@settings(max_examples=150, deadline=None)
@given(operations=operations, num_blocks=st.integers(1, 12))
def test_used_and_free_blocks_always_make_up_all_and_counts_match_the_holders(
    operations: list[tuple[int, int, int, int]], num_blocks: int
) -> None:
    manager = BlockManager(num_blocks, True)
    held: list[tuple[list[int], list[bytes]]] = []
    for kind, a, b, c in operations:
        if kind == 0:
            hashes = chain(*("pqrst"[:a]), *("xyz"[:c]))
            hits = manager.find_cached(hashes)
            if manager.can_allocate(hits, len(hashes) - len(hits)):
                held.append((manager.allocate(hits, len(hashes) - len(hits)), hashes))
        elif kind == 1 and held:
            blocks, hashes = held[a % len(held)]
            for block, value in zip(blocks[: b + 1], hashes, strict=False):
                manager.register(block, value)
        elif held:
            blocks, _ = held.pop(a % len(held))
            manager.free(np.array(blocks, np.int32))
        manager.check()
        counts = np.zeros(num_blocks, np.int32)
        for blocks, _ in held:
            counts[blocks] += 1
        assert (manager.reference_counts == counts).all()
        assert manager.num_used + manager.num_free == num_blocks
