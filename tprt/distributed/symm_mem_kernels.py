# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Sums and gathers over memory that every rank can read, each as one Triton kernel.

Memory of a rank: flags, two halves for data, and words for small sums (`symm_mem_words`). A call stages its
tensor in one half, meets its peers, and reads theirs. Calls take turns with the halves, which makes one meeting
per call enough: who writes into a half has been through the call in between, which every peer began once it was
done with that half. So no call may be without one; there is none for an empty tensor.

Programs of one number meet, `NUM_PROGRAMS` of them in every launch, each with a count of its calls on the
device: it says which half it is and what the flags must reach. So a captured graph can be replayed, and calls
of any size may follow each other.

A sum is a fold in rank order, rank 0 + rank 1 + ..., in float32, rounded once: all ranks get the same bits, and
those of the collectives between CPU ranks.

A rank that waits longer than its deadline stops with an error of the device, which then every later call has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import globaltimer

NUM_PROGRAMS = 64
MAX_WORLD_SIZE = 16
FLAG_BYTES = NUM_PROGRAMS * MAX_WORLD_SIZE * 8
_FLAG_BYTES = tl.constexpr(FLAG_BYTES)
_VECTOR_BYTES = 16
_FEW_WARPS, _MANY_WARPS = 8, 16
_MANY_BYTES = 512 * 1024
_SCALARS = ["rank", "half_bytes", "timeout_ns"]


@dataclass(frozen=True, slots=True)
class SharedHalves:
    """The memory of all ranks as one of them sees it.

    Attributes:
        rank: this rank.
        world_size: number of ranks.
        addresses: `[world_size]` int64 on the device: where each rank's memory begins.
        counts: `[NUM_PROGRAMS]` int64 on the device, zeros at first: calls of this rank's programs.
        half_bytes: size of a half, a multiple of 16.
        words_offset: where the words of `symm_mem_words` begin in each rank's memory.
        timeout_ns: longest wait for a peer.
    """

    rank: int
    world_size: int
    addresses: Tensor
    counts: Tensor
    half_bytes: int
    words_offset: int
    timeout_ns: int


@triton.jit
def now_ns():
    """Return the nanoseconds of a clock that runs on."""
    return globaltimer()


@triton.jit
def stop_if_late(started_ns, timeout_ns):
    """Stop this process's work on the device, with an error, if it is `timeout_ns` past `started_ns`."""
    if globaltimer() - started_ns > timeout_ns:
        tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _meet(  # noqa: PLR0913
    addresses, program, rank, value, timeout_ns, world_size: tl.constexpr, lanes: tl.constexpr
):
    """Post `value` to all ranks, and wait until all have posted as much and what they wrote before is there."""
    peer = tl.arange(0, lanes)
    real = peer < world_size
    base = tl.load(addresses + peer, mask=real, other=0)
    there = base.to(tl.pointer_type(tl.int64)) + (program * world_size + rank)
    tl.debug_barrier()
    tl.atomic_xchg(there, tl.zeros((lanes,), tl.int64) + value, mask=real, sem="release", scope="sys")
    here = tl.load(addresses + rank).to(tl.pointer_type(tl.int64)) + program * world_size
    started_ns = now_ns()
    missing = tl.sum(real.to(tl.int32), 0)
    while missing > 0:
        seen = tl.load(here + peer, mask=real, other=value, volatile=True)
        missing = tl.sum((seen < value).to(tl.int32), 0)
        stop_if_late(started_ns, timeout_ns)
    tl.inline_asm_elementwise(
        "fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
    tl.debug_barrier()


@triton.jit
def _half_of(addresses, peer, offset, like):
    """Return where `peer`'s half begins, as a pointer like `like`."""
    return tl.multiple_of((tl.load(addresses + peer) + offset).to(like.dtype), 16)


@triton.jit
def _fold(addresses, offset, where, real, like, world_size: tl.constexpr):
    """Return the sum of all ranks' parts at `where`, in float32."""
    first = tl.load(_half_of(addresses, 0, offset, like) + where, mask=real, cache_modifier=".cg")
    total = first.to(tl.float32)
    for peer in tl.static_range(1, world_size):
        part = tl.load(_half_of(addresses, peer, offset, like) + where, mask=real, cache_modifier=".cg")
        total += part.to(tl.float32)
    return total


@triton.jit(do_not_specialize=_SCALARS)
def _sum_one_shot_kernel(  # noqa: PLR0913
    tensor,
    num_elements,
    addresses,
    counts,
    rank,
    half_bytes,
    timeout_ns,
    world_size: tl.constexpr,
    lanes: tl.constexpr,
    tile: tl.constexpr,
    num_programs: tl.constexpr,
):
    """Every rank reads every part of every rank."""
    program = tl.program_id(0)
    count = tl.load(counts + program)
    offset = _FLAG_BYTES + (count & 1) * half_bytes
    own = _half_of(addresses, rank, offset, tensor)
    if program * tile < num_elements:
        for start in range(program * tile, num_elements, num_programs * tile):
            where = start + tl.arange(0, tile)
            real = where < num_elements
            tl.store(own + where, tl.load(tensor + where, mask=real), mask=real)
        _meet(addresses, program, rank, 2 * count + 1, timeout_ns, world_size, lanes)
        for start in range(program * tile, num_elements, num_programs * tile):
            where = start + tl.arange(0, tile)
            real = where < num_elements
            total = _fold(addresses, offset, where, real, tensor, world_size)
            tl.store(tensor + where, total.to(tensor.dtype.element_ty), mask=real)
    tl.debug_barrier()
    tl.store(counts + program, count + 1)


@triton.jit(do_not_specialize=_SCALARS)
def _sum_two_shot_kernel(  # noqa: PLR0913
    tensor,
    num_elements,
    addresses,
    counts,
    rank,
    half_bytes,
    timeout_ns,
    world_size: tl.constexpr,
    lanes: tl.constexpr,
    tile: tl.constexpr,
    num_programs: tl.constexpr,
):
    """Rank r sums every tile whose number is r modulo `world_size`; then all read the sums of all."""
    program = tl.program_id(0)
    count = tl.load(counts + program)
    offset = _FLAG_BYTES + (count & 1) * half_bytes
    own = _half_of(addresses, rank, offset, tensor)
    row = world_size * tile
    if program * row < num_elements:
        for start in range(program * row, num_elements, num_programs * row):
            for peer in tl.static_range(world_size):
                where = start + peer * tile + tl.arange(0, tile)
                real = where < num_elements
                tl.store(own + where, tl.load(tensor + where, mask=real), mask=real)
        _meet(addresses, program, rank, 2 * count + 1, timeout_ns, world_size, lanes)
        for start in range(program * row, num_elements, num_programs * row):
            where = start + rank * tile + tl.arange(0, tile)
            real = where < num_elements
            total = _fold(addresses, offset, where, real, tensor, world_size)
            tl.store(own + where, total.to(tensor.dtype.element_ty), mask=real)
        _meet(addresses, program, rank, 2 * count + 2, timeout_ns, world_size, lanes)
        for start in range(program * row, num_elements, num_programs * row):
            for peer in tl.static_range(world_size):
                where = start + peer * tile + tl.arange(0, tile)
                real = where < num_elements
                source = _half_of(addresses, peer, offset, tensor) + where
                tl.store(tensor + where, tl.load(source, mask=real, cache_modifier=".cg"), mask=real)
    tl.debug_barrier()
    tl.store(counts + program, count + 1)


@triton.jit(do_not_specialize=_SCALARS)
def _gather_kernel(  # noqa: PLR0913
    output,
    part,
    num_own,
    num_elements,
    row_elements,
    addresses,
    counts,
    rank,
    half_bytes,
    timeout_ns,
    world_size: tl.constexpr,
    lanes: tl.constexpr,
    tile: tl.constexpr,
    num_programs: tl.constexpr,
):
    """Row r of `output` becomes rank r's part; shorter parts are padded with anything."""
    program = tl.program_id(0)
    count = tl.load(counts + program)
    offset = _FLAG_BYTES + (count & 1) * half_bytes
    own = _half_of(addresses, rank, offset, part)
    if program * tile < num_elements:
        for start in range(program * tile, num_elements, num_programs * tile):
            where = start + tl.arange(0, tile)
            tl.store(own + where, tl.load(part + where, mask=where < num_own), mask=where < num_own)
        _meet(addresses, program, rank, 2 * count + 1, timeout_ns, world_size, lanes)
        for start in range(program * tile, num_elements, num_programs * tile):
            where = start + tl.arange(0, tile)
            real = where < num_elements
            for peer in tl.static_range(world_size):
                source = _half_of(addresses, peer, offset, part) + where
                found = tl.load(source, mask=real, cache_modifier=".cg")
                tl.store(output + peer * row_elements + where, found, mask=real)
    tl.debug_barrier()
    tl.store(counts + program, count + 1)


def sum_one_shot(flat: Tensor, halves: SharedHalves) -> None:
    """Sum `flat` `[n]`, contiguous and no larger than a half, over all ranks, in place; best for small ones."""
    num_warps = _FEW_WARPS if flat.nbytes <= _MANY_BYTES else _MANY_WARPS
    _launch(_sum_one_shot_kernel, num_warps, flat, (flat, flat.numel()), halves)


def sum_two_shot(flat: Tensor, halves: SharedHalves) -> None:
    """Sum as `sum_one_shot` does, with two meetings and less to read; best for large ones."""
    _launch(_sum_two_shot_kernel, _MANY_WARPS, flat, (flat, flat.numel()), halves)


def gather(output: Tensor, part: Tensor, num_elements: int, halves: SharedHalves) -> None:
    """Write rank r's first `num_elements` of its part into row r of `output` `[world_size, n]`, n or fewer.

    `part` is this rank's, contiguous, of whole numbers, and no larger than a half; it may be shorter.
    """
    assert output.stride(1) == 1
    arguments = (output, part, part.numel(), num_elements, output.stride(0))
    _launch(_gather_kernel, _FEW_WARPS, part, arguments, halves)


def _launch(kernel, num_warps: int, like: Tensor, arguments: tuple[Any, ...], halves: SharedHalves) -> None:
    kernel[(NUM_PROGRAMS,)](
        *arguments,
        *(halves.addresses, halves.counts, halves.rank, halves.half_bytes, halves.timeout_ns),
        world_size=halves.world_size,
        lanes=max(2, triton.next_power_of_2(halves.world_size)),
        tile=num_warps * 32 * _VECTOR_BYTES // like.element_size(),
        num_programs=NUM_PROGRAMS,
        num_warps=num_warps,
    )


def can_sum(dtype: torch.dtype) -> bool:
    """Tell whether the kernels sum `dtype`."""
    return dtype in (torch.bfloat16, torch.float16, torch.float32)
