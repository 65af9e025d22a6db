"""Hashes of token blocks: the name that a KV block of a known prefix has, in every process.

A full block is known by a hash of its tokens and of the hash before it, so one hash stands for the whole
prefix. BLAKE2b with 256 bits: the tokens are not compared, since nobody can make two chains with one hash.
Knows nothing of where blocks are.
"""

from __future__ import annotations

from hashlib import blake2b

_HASH_BYTES = 32
NO_PARENT = bytes(_HASH_BYTES)


def hash_block(parent: bytes, token_bytes: bytes) -> bytes:
    """Return the hash of a full block.

    Args:
        parent: hash of the block before it, `NO_PARENT` for the first.
        token_bytes: its token ids as packed int32.
    """
    return blake2b(parent + token_bytes, digest_size=_HASH_BYTES).digest()


def extend_hashes(hashes: list[bytes], token_bytes: bytes, block_bytes: int) -> None:
    """Append to `hashes`, those of leading blocks, the hashes of the full blocks that follow.

    Args:
        hashes: of the first blocks of the chain.
        token_bytes: token ids of the whole chain as packed int32; what fills no block is left out.
        block_bytes: size of a block of them.
    """
    parent = hashes[-1] if hashes else NO_PARENT
    for start in range(len(hashes) * block_bytes, len(token_bytes) - block_bytes + 1, block_bytes):
        parent = hash_block(parent, token_bytes[start : start + block_bytes])
        hashes.append(parent)
