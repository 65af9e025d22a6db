# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""What a captured decode begins with, in one kernel: its tokens, and the block tables of its sequences."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Entries of a table, and changes, that are looked at together.
_TILE = 128


@triton.jit(
    do_not_specialize=["num_changes", "width"],
    do_not_specialize_on_alignment=["token_ids", "slots", "places", "values"],
)
def _begin_kernel(  # noqa: PLR0913
    chosen,
    rows,
    token_ids,
    last_token_ids,
    slots,
    tables,
    places,
    values,
    num_changes,
    width,
    tile: tl.constexpr,
):
    """One program for a sequence; of the changes it writes those to the table of its slot."""
    seq, lane = tl.program_id(0).to(tl.int64), tl.arange(0, tile)
    slot, token = tl.load(slots + seq), tl.load(token_ids + seq)
    tl.store(chosen + seq, tl.where(token < 0, tl.load(last_token_ids + slot), token))
    first = slot * width
    for start in range(0, num_changes, tile):
        real = start + lane < num_changes
        place = tl.load(places + start + lane, mask=real, other=-1)
        value = tl.load(values + start + lane, mask=real, other=0)
        tl.store(tables + place, value, mask=(place >= first) & (place < first + width))
    # All threads have written before any of them reads.
    tl.debug_barrier()
    for start in range(0, width, tile):
        real = start + lane < width
        entries = tl.load(tables + first + start + lane, mask=real, other=0)
        tl.store(rows + seq * width + start + lane, entries, mask=real)


def begin_decode(
    token_ids: Tensor, last_token_ids: Tensor, slots: Tensor, tables: Tensor, changes: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Write `changes` into `tables`, and look up what a step of decodes needs.

    Args:
        token_ids: `[S]` int64; negative where the token is the last one of its slot.
        last_token_ids: `[slots]` int64.
        slots: `[S]` int64. Sequences of the same slot are padding: what they change there is the same.
        tables: `[slots, width]` int32.
        changes: places `[U]` int64 in the flattened `tables`, all in rows of `slots`, and values `[U]` int32.

    Returns:
        tokens `[S]` int64, and block tables `[S, width]` int32.
    """
    (num_seqs,), width = slots.shape, tables.shape[1]
    chosen, rows = token_ids.new_empty(num_seqs), tables.new_empty(num_seqs, width)
    places, values = changes
    _begin_kernel[(num_seqs,)](
        *(chosen, rows, token_ids, last_token_ids, slots, tables, places, values, len(places), width),
        tile=_TILE,
        num_warps=1,
    )
    return chosen, rows
