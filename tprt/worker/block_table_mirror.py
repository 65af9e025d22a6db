"""The block tables of all slots, kept on the device, of which a step sends what has changed.

A step names the whole table of every sequence, 2.6 MB for 256 sequences of 40,960 tokens; from one step to the
next, one sequence in 16 gets a block. Knows nothing of blocks' contents.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tprt.messages import Int32Array, Int64Array


class BlockTableMirror:
    """`device_tables` `[max_num_seqs + 1, width]` int32, the last row for padding, and what is known of it."""

    def __init__(self, max_num_seqs: int, width: int, device: torch.device) -> None:
        self.width = width
        self.padding_row = max_num_seqs
        self.device_tables = torch.zeros((max_num_seqs + 1, width), dtype=torch.int32, device=device)
        self._known: Int32Array = np.zeros((max_num_seqs + 1, width), np.int32)

    def changes(self, slots: NDArray[np.integer], tables: Int32Array) -> tuple[Int64Array, Int32Array]:
        """Return where the device's tables differ from `tables` `[S, B]` of `slots`, and take it as known.

        Returns:
            `[U]` places in the flattened `device_tables`, and what is to be written there.
        """
        num_columns = tables.shape[1]
        places = np.flatnonzero(self._known[slots, :num_columns] != tables)
        rows, columns = np.divmod(places, num_columns)
        at: Int64Array = slots[rows].astype(np.int64) * self.width + columns
        values = tables.reshape(-1)[places]
        self._known.reshape(-1)[at] = values
        return at, values

    def write(self, places: Tensor, values: Tensor) -> None:
        """Write `values` `[U]` at `places` `[U]`, both on the device."""
        self.device_tables.view(-1).index_copy_(0, places, values)
