"""KV blocks: who holds which, and which still hold the KV of a known prefix.

A block is used while its reference count is above zero, and free otherwise. A free block keeps its KV, and
can be taken back by a sequence with the same prefix, until it is handed out for other tokens; the one that
was freed longest ago goes first. A sequence's blocks are freed from the last to the first, and whoever holds
a block holds the blocks before it, so the tail of a chain always goes before its head.

A full block is known by the hash of `tprt/block_hash.py`.

Knows nothing of sequences, steps, or where the KV is.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from tprt.messages import Int32Array


class BlockManager:
    """The KV blocks of one worker group, by number; every rank's are alike."""

    def __init__(self, num_blocks: int, enable_prefix_caching: bool) -> None:
        self._num_blocks = num_blocks
        self._caching = enable_prefix_caching
        self._reference_counts = np.zeros(num_blocks, np.int32)
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}
        # Free blocks without a hash: nothing is lost by taking them. Low numbers first, for readable traces.
        self._blank = list(range(num_blocks - 1, -1, -1))
        # Free blocks with one, least recently freed first.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def enable_prefix_caching(self) -> bool:
        """Tell whether blocks are ever found again."""
        return self._caching

    @property
    def num_blocks(self) -> int:
        """All blocks."""
        return self._num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds, cached ones included."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that at least one sequence holds."""
        return int(np.count_nonzero(self._reference_counts))

    @property
    def reference_counts(self) -> Int32Array:
        """`[num_blocks]` holders of each block; a copy."""
        return self._reference_counts.copy()

    def find_cached(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of the longest known prefix; `hashes` is read no further than needed."""
        blocks: list[int] = []
        if self._caching:
            for block_hash in hashes:
                block = self._block_of_hash.get(block_hash)
                if block is None:
                    break
                blocks.append(block)
        return blocks

    def can_allocate(self, cached: Sequence[int], num_new: int) -> bool:
        """Tell whether `num_new` blocks are free besides the blocks of `cached`."""
        return num_new <= self.num_free - sum(block in self._cached for block in cached)

    def allocate(self, cached: Sequence[int], num_new: int) -> list[int]:
        """Take the blocks that `find_cached` returned and `num_new` others, in this order."""
        assert self.can_allocate(cached, num_new), "call can_allocate first"
        for block in cached:
            self._cached.pop(block, None)
        self._reference_counts[np.array(cached, np.intp)] += 1
        return [*cached, *self.append(num_new)]

    def append(self, num_new: int) -> list[int]:
        """Take `num_new` free blocks, those that cache nothing first."""
        assert num_new <= self.num_free, "call can_allocate first"
        blocks = [self._blank.pop() if self._blank else self._evict() for _ in range(num_new)]
        self._reference_counts[np.array(blocks, np.intp)] = 1
        return blocks

    def free(self, blocks: Int32Array) -> None:
        """Let go of one sequence's blocks `[n]`, which are given from its first to its last."""
        counts = self._reference_counts
        assert (counts[blocks] > 0).all(), "a block was freed twice"
        counts[blocks] -= 1
        for block in blocks[counts[blocks] == 0][::-1].tolist():
            if self._hashes[block] is None:
                self._blank.append(block)
            else:
                self._cached[block] = None

    def register(self, block: int, block_hash: bytes) -> None:
        """Make a used block known, now that its KV is computed.

        Of two blocks with the same tokens the first stays the known one.
        """
        assert self._reference_counts[block] > 0, "a free block was registered"
        assert self._hashes[block] in (None, block_hash), "a block was registered for other tokens"
        if self._block_of_hash.setdefault(block_hash, block) == block:
            self._hashes[block] = block_hash

    def check(self) -> None:
        """Assert that every block is used or free, once, and that hashes and blocks agree."""
        free = [*self._blank, *self._cached]
        assert len(set(free)) == len(free), "a block is free twice"
        assert not self._reference_counts[free].any(), "a free block is held"
        assert self.num_used + self.num_free == self._num_blocks, "a block is lost"
        known = {block: value for block, value in enumerate(self._hashes) if value is not None}
        assert known == {block: value for value, block in self._block_of_hash.items()}
        assert known.keys() >= self._cached.keys()
        assert not known.keys() & set(self._blank)

    def _evict(self) -> int:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hashes[block]
        assert block_hash is not None, "a cached block has no hash"
        del self._block_of_hash[block_hash]
        self._hashes[block] = None
        return block
