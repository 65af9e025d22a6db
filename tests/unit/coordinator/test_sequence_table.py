"""What a step reads from the table of running sequences."""

from __future__ import annotations

import numpy as np
import pytest

from tprt.coordinator.limits import SchedulerLimits
from tprt.coordinator.sequence import SequenceTable

LIMITS = SchedulerLimits(
    max_num_seqs=6, max_num_batched_tokens=64, max_model_len=400, block_size=4, num_blocks=400
)


@pytest.mark.parametrize("num_blocks", [[3, 3, 3], [5, 1, 4], [1, 90, 1], [7]], ids=str)
def test_block_tables_lie_end_to_end_whatever_their_lengths(num_blocks: list[int]) -> None:
    table = SequenceTable(LIMITS, ())
    table.block_tables[:] = np.arange(table.block_tables.size).reshape(table.block_tables.shape)
    slots = np.array([4, 0, 3][: len(num_blocks)], np.intp)
    expected = [table.block_tables[slot, :n].tolist() for slot, n in zip(slots, num_blocks, strict=True)]
    found = table.block_ids(slots, np.array(num_blocks, np.int32))
    assert found.dtype == np.int32
    assert found.tolist() == [block for blocks in expected for block in blocks]
