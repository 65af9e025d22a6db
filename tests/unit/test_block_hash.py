"""A block's hash stands for all tokens up to its end."""

from __future__ import annotations

import numpy as np

from tprt.block_hash import NO_PARENT, extend_hashes, hash_block


def test_a_chain_that_is_extended_is_the_chain_that_is_made_at_once() -> None:
    tokens = np.arange(40, dtype=np.int32).tobytes()
    at_once: list[bytes] = []
    extend_hashes(at_once, tokens, 16 * 4)
    in_two = at_once[:1]
    extend_hashes(in_two, tokens, 16 * 4)
    first = hash_block(NO_PARENT, tokens[:64])
    # 40 tokens fill two blocks of 16
    assert at_once == in_two == [first, hash_block(first, tokens[64:128])]
    extend_hashes(in_two, tokens, 16 * 4)
    assert in_two == at_once
