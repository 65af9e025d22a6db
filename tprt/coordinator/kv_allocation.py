"""KV blocks of the rows of the table: taken when a sequence gets a row, added as it grows, let go at its end.

The one place that knows both the table and the block manager. Knows nothing of policy: whether there are
blocks is told, who must give way is decided elsewhere.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from tprt.coordinator.block_manager import BlockManager
from tprt.coordinator.engine_counters import EngineCounters
from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.sequence import Sequence, SequenceTable, Slots
from tprt.coordinator.step import StepInFlight


class KVAllocation:
    """The blocks of all rows of `table`."""

    def __init__(self, table: SequenceTable, limits: SchedulerLimits, counters: EngineCounters) -> None:
        self._table = table
        self._counters = counters
        self._block_size = limits.block_size
        self._blocks = BlockManager(limits.num_blocks, limits.enable_prefix_caching)

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds."""
        return self._blocks.num_free

    def try_place(self, sequence: Sequence, num_reserved: int) -> int | None:
        """Give a waiting sequence a row, and blocks for all its tokens, cached ones as far as there are.

        At least its last token is left to compute, so that a next one can be sampled.

        Returns:
            Its slot, or None when fewer than `num_reserved` blocks would be left.
        """
        cached, num_new = self._find_blocks(sequence)
        if not self._blocks.can_allocate(cached, num_new + num_reserved):
            return None
        num_cached_tokens = len(cached) * self._block_size
        if sequence.num_cached_tokens < 0:
            # A request that comes with tokens of its output may find those as well.
            sequence.num_cached_tokens = num_of_prompt = min(num_cached_tokens, sequence.prompt_len)
            tell = partial(self._table.note_queue_time, sequence)
            self._counters.prompt_runs(sequence.prompt_len, num_of_prompt, sequence.arrived_ns, tell)
        return self._table.place(sequence, self._blocks.allocate(cached, num_new), num_cached_tokens)

    def can_place(self, sequence: Sequence, num_reserved: int) -> bool:
        """Tell whether there are blocks for `try_place`."""
        cached, num_new = self._find_blocks(sequence)
        return self._blocks.can_allocate(cached, num_new + num_reserved)

    def try_grow(self, slots: Slots) -> bool:
        """Give each row a block for its newest token where it has none; all of them or none."""
        table = self._table
        num_blocks = table.num_blocks[slots]
        missing = table.num_tokens[slots] - num_blocks * self._block_size
        rows = (missing > 0).nonzero()[0]
        if len(rows) > self._blocks.num_free:
            return False
        if len(rows):
            assert missing.max() <= self._block_size, "a row grew by more than a block"
            short, ends = slots[rows], num_blocks[rows]
            table.block_tables[short, ends] = self._blocks.append(len(rows))
            table.num_blocks[short] = ends + 1
        return True

    def release(self, slot: int) -> Sequence:
        """Free the blocks and the row of a sequence, which keeps its tokens."""
        assert self._table.in_flight[slot] == 0, "a step in flight uses the blocks"
        self._blocks.free(self._table.blocks(slot))
        return self._table.remove(slot)

    def register_computed(self, step: StepInFlight) -> None:
        """Let other sequences find the blocks that `step`, which is done, has filled."""
        if not self._blocks.enable_prefix_caching:
            return
        num_full, num_known = step.context_lens // self._block_size, self._table.num_known_blocks
        rows = (num_full > num_known[step.slots]).nonzero()[0]
        if len(rows) == 0:
            return
        slots, ends = step.slots[rows], num_full[rows]
        for slot, first, end in zip(slots.tolist(), num_known[slots].tolist(), ends.tolist(), strict=True):
            self._register_row(slot, first, end)
        num_known[slots] = ends

    def check(self) -> None:
        """Assert that block tables and reference counts agree."""
        self._blocks.check()
        held = [self._table.blocks(slot) for slot, s in enumerate(self._table.sequences) if s is not None]
        counts = np.zeros(self._blocks.num_blocks, np.int32)
        for blocks in held:
            # A block twice in one table would be counted once, and so be noticed.
            counts[blocks] += 1
        assert (self._blocks.reference_counts == counts).all(), "reference counts differ from the tables"

    def _find_blocks(self, sequence: Sequence) -> tuple[list[int], int]:
        """Return the cached blocks of a sequence, and how many more it needs.

        What is to be scored must be computed, in whatever blocks it has been before.
        """
        tokens, size = sequence.token_ids, self._block_size
        num_cacheable = len(tokens) - 1
        if to_score := sequence.positions_to_score:
            num_cacheable = to_score.start
        cached = self._blocks.find_cached(sequence.hash_blocks(tokens, 0, num_cacheable // size, size))
        return cached, -(-len(tokens) // size) - len(cached)

    def _register_row(self, slot: int, first: int, end: int) -> None:
        table = self._table
        hashes = table.sequence(slot).hash_blocks(table.token_ids[slot], first, end, self._block_size)
        for block, block_hash in zip(table.block_tables[slot, first:end].tolist(), hashes, strict=True):
            self._blocks.register(block, block_hash)
