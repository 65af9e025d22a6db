"""Which prefixes one replica has computed lately, as far as can be told from what was sent to it.

Nobody asks the replica: it is known what its prefix cache is made of, and this forgets as that does, the block
that was used longest ago first, and the end of a prefix before its beginning. Knows nothing of other replicas.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

MAX_BLOCKS = 2**18
"""Most blocks that are kept of one replica, however large its cache is: some 40 MB."""


class PrefixIndex:
    """Hashes of the blocks that a replica is taken to have."""

    def __init__(self) -> None:
        """Know nothing, and keep nothing until there is room."""
        self._capacity = 0
        self._blocks: OrderedDict[bytes, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def resize(self, num_blocks: int) -> None:
        """Keep as many blocks as the replica can, up to `MAX_BLOCKS`."""
        self._capacity = min(num_blocks, MAX_BLOCKS)
        self._forget_oldest()

    def clear(self) -> None:
        """Forget everything, as a replica does whose ranks are replaced."""
        self._blocks.clear()

    def count_known(self, hashes: Sequence[bytes]) -> int:
        """Return how many of the leading blocks the replica has."""
        for count, block_hash in enumerate(hashes):
            if block_hash not in self._blocks:
                return count
        return len(hashes)

    def add(self, hashes: Sequence[bytes]) -> None:
        """Note that the replica computes, or uses, the blocks of this prefix."""
        for block_hash in reversed(hashes):
            self._blocks[block_hash] = None
            self._blocks.move_to_end(block_hash)
        self._forget_oldest()

    def _forget_oldest(self) -> None:
        while len(self._blocks) > self._capacity:
            self._blocks.popitem(last=False)
