# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Sums of a few KiB over memory that every rank can write, as one Triton kernel without any meeting.

Each rank writes its tensor into the memory of all, four bytes at a time beside four that say of which call they
are. Eight bytes are written at once, so whoever reads the stamp has the data. Nobody waits for anything else:
neither for its own writes to arrive nor for a second way over the link (NCCL's LL protocol does the same).

Two sets of words take turns by the same counts as the halves of `symm_mem_kernels`, for the same reason. They
have memory of their own, in which nothing but stamped words ever lies. Stamps come back after 2**31 calls; a
word would have to lie untouched for exactly as many to be taken for new.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from tprt.distributed.symm_mem_kernels import NUM_PROGRAMS, SharedHalves, now_ns, stop_if_late

_NUM_WARPS = 4
_TILE = 256
MAX_WORDS = NUM_PROGRAMS * _TILE
"""The most words, of four bytes, that one sum can have: a tile for each program."""
_MAX_WORDS = tl.constexpr(MAX_WORDS)
_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def words_bytes(world_size: int) -> int:
    """Return the bytes of both sets of words of one rank."""
    return 2 * world_size * MAX_WORDS * 8


@triton.jit
def _low(word, element: tl.constexpr):
    """Return the first of the two elements in a word, or the only one, in float32."""
    if element == tl.float32:
        return word.to(tl.float32, bitcast=True)
    else:  # noqa: RET505 - what follows a constant condition is compiled
        return (word & 0xFFFF).to(tl.int16).to(element, bitcast=True).to(tl.float32)


@triton.jit
def _high(word, element: tl.constexpr):
    """Return the second of the two elements in a word, in float32; of four bytes there is none."""
    if element == tl.float32:
        return word.to(tl.float32, bitcast=True)
    else:  # noqa: RET505
        return (word >> 16).to(tl.int16).to(element, bitcast=True).to(tl.float32)


@triton.jit
def _as_word(low, high, element: tl.constexpr):
    if element == tl.float32:
        return low.to(tl.int32, bitcast=True)
    else:  # noqa: RET505
        first = low.to(element).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        return first | (high.to(element).to(tl.int16, bitcast=True).to(tl.int32) << 16)


@triton.jit(do_not_specialize=["rank", "offset", "timeout_ns"])
def _sum_words_kernel(  # noqa: PLR0913
    words,
    num_words,
    addresses,
    counts,
    rank,
    offset,
    timeout_ns,
    world_size: tl.constexpr,
    element: tl.constexpr,
    tile: tl.constexpr,
):
    """Program p sums tile p."""
    program = tl.program_id(0)
    count = tl.load(counts + program)
    if program * tile < num_words:
        where = program * tile + tl.arange(0, tile)
        real = where < num_words
        # 0, which is what the memory holds in the beginning, is no stamp.
        stamp = ((count & 0x7FFFFFFF) + 1) << 32
        own = tl.load(words + where, mask=real, other=0).to(tl.uint32, bitcast=True).to(tl.int64)
        place = offset + (count & 1) * (world_size * _MAX_WORDS * 8)
        for peer in tl.static_range(world_size):
            base = (tl.load(addresses + peer) + place).to(tl.pointer_type(tl.int64)) + rank * _MAX_WORDS
            tl.inline_asm_elementwise(
                """
                {
                    .reg .pred %real;
                    setp.ne.s32 %real, $3, 0;
                    @%real st.relaxed.sys.global.b64 [$1], $2;
                    mov.u32 $0, 0;
                }
                """,
                "=r,l,l,r",
                [base + where, own | stamp, real.to(tl.int32)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )
        here = (tl.load(addresses + rank) + place).to(tl.pointer_type(tl.int64)) + where
        started_ns = now_ns()
        for peer in tl.static_range(world_size):
            found = tl.load(here + peer * _MAX_WORDS, mask=real, other=stamp, volatile=True)
            missing = tl.sum(((found ^ stamp) >> 32 != 0).to(tl.int32), 0)
            while missing > 0:
                found = tl.load(here + peer * _MAX_WORDS, mask=real, other=stamp, volatile=True)
                missing = tl.sum(((found ^ stamp) >> 32 != 0).to(tl.int32), 0)
                stop_if_late(started_ns, timeout_ns)
            word = found.to(tl.int32)
            if peer == 0:
                low, high = _low(word, element), _high(word, element)
            else:
                low += _low(word, element)
                high += _high(word, element)
        tl.store(words + where, _as_word(low, high, element), mask=real)
    tl.debug_barrier()
    tl.store(counts + program, count + 1)


def can_sum_words(tensor: Tensor) -> bool:
    """Tell whether `tensor` is a few whole words that lie end to end."""
    is_small = 0 < tensor.nbytes <= 4 * MAX_WORDS and tensor.nbytes % 4 == 0
    return is_small and tensor.is_contiguous() and tensor.data_ptr() % 4 == 0


def sum_words(tensor: Tensor, halves: SharedHalves) -> None:
    """Sum `tensor`, of which `can_sum_words` holds, over all ranks, in place."""
    words = tensor.view(-1).view(torch.int32)
    _sum_words_kernel[(NUM_PROGRAMS,)](
        *(words, words.numel(), halves.addresses, halves.counts, halves.rank, halves.words_offset),
        halves.timeout_ns,
        world_size=halves.world_size,
        element=_TYPES[tensor.dtype],
        tile=_TILE,
        num_warps=_NUM_WARPS,
    )
