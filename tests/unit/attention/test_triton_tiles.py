"""Tiles and splits fill the device, and follow from shapes alone."""

from __future__ import annotations

import pytest
import torch

from tprt.attention.triton_tiles import Traits, decode_tile, num_splits, padded, prefill_tile, prepares_heads

H100 = Traits.of(torch.device("cpu"))
TURING = Traits(40, large_shared_memory=False, tensor_cores=False)
AMPERE = Traits(84, large_shared_memory=False, tensor_cores=True)


def is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8, 32])
def test_splits_fill_the_device_and_no_more(kv_heads: int) -> None:
    for batch_size in range(1, 300):
        splits = num_splits(batch_size, kv_heads, H100.processors)
        assert 1 <= splits <= 32
        assert is_power_of_two(splits)
        assert splits == 1 or batch_size * kv_heads * splits <= 4 * H100.processors


def test_a_padded_batch_is_split_as_it_would_be_unpadded() -> None:
    for bucket in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        within = range(bucket // 2 + 1, bucket + 1)
        assert len({num_splits(batch_size, 8, H100.processors) for batch_size in within}) == 1


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 8, 32])
def test_heads_are_prepared_by_decodes_of_one_wave_of_programs(kv_heads: int) -> None:
    for batch_size in range(1, 600):
        padded_size = 1 << (batch_size - 1).bit_length()
        prepares = prepares_heads(batch_size, kv_heads, H100.processors)
        assert prepares == (batch_size > 2 and padded_size * kv_heads <= 4 * H100.processors)


@pytest.mark.parametrize("traits", [H100, AMPERE, TURING], ids=["h100", "ampere", "turing"])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [1, 16, 64, 80, 128, 256])
def test_tiles_are_powers_of_two_that_fit_shared_memory(traits: Traits, itemsize: int, head_dim: int) -> None:
    available = (160 if traits.large_shared_memory else 96 if traits.tensor_cores else 64) * 1024
    decodes = [decode_tile(3, head_dim, itemsize, traits, prepares) for prepares in (False, True)]
    assert {decode.rows for decode in decodes} == {16}
    for tile in (*decodes, *(prefill_tile(longest, head_dim, itemsize, traits) for longest in (8, 2048))):
        assert all(is_power_of_two(side) and side >= 16 for side in (tile.rows, tile.tokens))
        # Queries, and keys and values of one tile in every stage but that of the product.
        rows = tile.rows + 2 * tile.tokens * (tile.num_stages - 1)
        assert rows * padded(head_dim) * itemsize <= available
