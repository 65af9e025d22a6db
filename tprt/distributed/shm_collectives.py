"""Collectives between CPU ranks of one host through shared memory: the default there.

A sum is a fold in rank order, rank 0 + rank 1 + ..., in float32 for 16-bit floats, so all ranks get the same
bits. Small tensors are summed in one shot: every rank stages its tensor and adds up all of them. Large ones
in two: rank r sums the r-th range of each chunk and all ranks copy the sums, so that a rank reads 2 tensors
and not `world_size`. Chunks overlap: in one round a rank copies the sums of chunk k - 2, sums its range of
chunk k - 1 and stages chunk k.

Three buffers take turns, one for each chunk, and make one round per chunk enough: who stages chunk k has
completed round k - 1, which every rank posted after it was done with chunk k - 3. Knows nothing of how ranks
wait for each other (`shm_rounds`) or find each other (`shm_rendezvous`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from tprt.distributed.shm_memory import NUM_BUFFERS, ShmGroupMemory, slots_start
from tprt.distributed.shm_rounds import ShmRounds
from tprt.errors import TransportError

_ONE_SHOT_BYTES = 128 * 1024
_MAX_CACHED_VIEWS = 512
_ALIGN_ELEMENTS = 64

_ALL_REDUCE, _ALL_GATHER, _BROADCAST, _MIN_INT, _BARRIER = range(1, 6)
_KIND_NAMES = ("", "all_reduce", "all_gather", "broadcast", "min_int", "barrier")
_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
_DTYPE_CODES = {dtype: code for code, dtype in enumerate(_DTYPES)}

# Views of every rank's slot in each buffer, in the shape of a message: [NUM_BUFFERS][world_size].
_Views = list[list[Tensor]]


def _signature(kind: int, dtype: torch.dtype, num_elements: int) -> int:
    """Say in one word what a rank does, so that ranks notice when they do different things."""
    return kind | _DTYPE_CODES[dtype] << 4 | num_elements << 8


def _describe(signature: int) -> str:
    kind, dtype, num_elements = signature & 15, signature >> 4 & 15, signature >> 8
    if kind >= len(_KIND_NAMES) or dtype >= len(_DTYPES):
        return f"an unknown collective {signature:#x}"
    return f"{_KIND_NAMES[kind]} of {num_elements} x {str(_DTYPES[dtype]).removeprefix('torch.')}"


class ShmCollectives:
    """One rank's end of a group that sums through shared memory; see `Collectives` for the methods.

    Tensors are on the CPU, of any shape and stride. Not for use by two threads at a time.

    Args:
        rank: this rank.
        world_size: number of ranks.
        memory: made by one process for all ranks; may be closed afterwards.
        timeout_s: longest wait for the other ranks in one round of a collective, in seconds.

    Raises:
        TransportError: the memory is for another number of ranks.
    """

    capturable = False

    def __init__(self, rank: int, world_size: int, memory: ShmGroupMemory, timeout_s: float) -> None:
        if memory.world_size != world_size or not 0 <= rank < world_size:
            raise TransportError(
                f"rank {rank} of world size {world_size} got shared memory for {memory.world_size} ranks;"
                " create it with the group's world size"
            )
        self._rank = rank
        self._world_size = world_size
        self._slot_bytes = memory.slot_bytes
        self._mapping = memory.map()
        self._words = memoryview(self._mapping).cast("Q")
        self._slots = self._make_slots()
        self._typed_slots: dict[torch.dtype, _Views] = {}
        self._message_views: dict[tuple[torch.dtype, torch.Size], tuple[int, _Views]] = {}
        self._rounds = ShmRounds(rank, memory, self._words, timeout_s, _describe)
        self._chunk = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum `tensor` over all ranks in place and return it."""
        self._rounds.begin_collective()
        cached = self._message_views.get((tensor.dtype, tensor.shape))
        if cached is None:
            if tensor.numel() == 0:
                return tensor
            if tensor.nbytes > min(_ONE_SHOT_BYTES, self._slot_bytes):
                return self._all_reduce_two_shot(tensor)
            cached = self._cache_message_views(tensor)
        signature, views = cached
        parts = views[self._chunk % NUM_BUFFERS]
        self._chunk += 1
        parts[self._rank].copy_(tensor)
        self._rounds.complete(signature)
        _fold(parts, tensor)
        return tensor

    def all_gather(self, tensor: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """Return the tensors of all ranks concatenated along `dim`, where rank r's has size `sizes[r]`."""
        self._rounds.begin_collective()
        dim %= tensor.dim()
        shapes = [(*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]) for size in sizes]
        gathered = [tensor.new_empty(shape) for shape in shapes]
        flats = [part.view(-1) for part in gathered]
        own = tensor.reshape(-1)
        signature = _signature(_ALL_GATHER, tensor.dtype, sum(flat.numel() for flat in flats))
        for low, high, slots in self._chunks(tensor.dtype, max(flat.numel() for flat in flats)):
            staged = own[low:high]
            slots[self._rank][: staged.numel()].copy_(staged)
            self._rounds.complete(signature)
            for flat, slot in zip(flats, slots, strict=True):
                received = flat[low:high]
                received.copy_(slot[: received.numel()])
        return torch.cat(gathered, dim)

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Overwrite `tensor` with that of rank `src` and return it."""
        self._rounds.begin_collective()
        whole = tensor.contiguous()
        flat = whole.view(-1)
        signature = _signature(_BROADCAST, tensor.dtype, flat.numel())
        for low, high, slots in self._chunks(tensor.dtype, flat.numel()):
            slot = slots[src][: high - low]
            if src == self._rank:
                slot.copy_(flat[low:high])
            self._rounds.complete(signature)
            if src != self._rank:
                flat[low:high].copy_(slot)
        return tensor if whole is tensor else tensor.copy_(whole)

    def min_int(self, value: int) -> int:
        """Return the least `value`, a signed 64-bit integer, of all ranks."""
        own = torch.tensor([value], dtype=torch.int64)
        return int(self.all_gather(own, [1] * self._world_size).min())

    def barrier(self) -> None:
        """Return when every rank has called it."""
        self._rounds.begin_collective()
        self._rounds.complete(_BARRIER)

    def close(self) -> None:
        """Release the memory and tell the peers; idempotent."""
        self._rounds.close()
        self._words.release()
        self._slots.clear()
        self._typed_slots.clear()
        self._message_views.clear()
        self._mapping.close()

    def _all_reduce_two_shot(self, tensor: Tensor) -> Tensor:
        whole = tensor.contiguous()
        flat = whole.view(-1)
        signature = _signature(_ALL_REDUCE, tensor.dtype, flat.numel())
        chunks = [
            _Chunk(flat[low:high], slots, self._rank)
            for low, high, slots in self._chunks(tensor.dtype, flat.numel())
        ]
        for step in range(len(chunks) + 2):
            if step >= 2:
                chunks[step - 2].copy_sums()
            if 1 <= step <= len(chunks):
                chunks[step - 1].sum_own_range()
            if step < len(chunks):
                chunks[step].stage()
            if step <= len(chunks):
                self._rounds.complete(signature)
        return tensor if whole is tensor else tensor.copy_(whole)

    def _chunks(self, dtype: torch.dtype, num_elements: int) -> Iterator[tuple[int, int, list[Tensor]]]:
        """Yield the bounds of each chunk of a message, and every rank's slot for it."""
        views = self._typed_slots.get(dtype) or self._cache_typed_slots(dtype)
        chunk_elements = self._slot_bytes // dtype.itemsize
        for low in range(0, num_elements, chunk_elements):
            slots = views[self._chunk % NUM_BUFFERS]
            self._chunk += 1
            yield low, min(low + chunk_elements, num_elements), slots

    def _make_slots(self) -> _Views:
        """Return every slot as bytes, `[slot_bytes]`."""
        start = slots_start(self._world_size)
        with torch.inference_mode(False):
            whole = torch.frombuffer(self._mapping, dtype=torch.uint8, offset=start)
            slots = whole.view(NUM_BUFFERS, self._world_size, self._slot_bytes)
            return [list(buffer.unbind()) for buffer in slots.unbind()]

    def _cache_typed_slots(self, dtype: torch.dtype) -> _Views:
        if dtype not in _DTYPE_CODES:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise TransportError(f"shared memory collectives of {dtype}: expected one of {known}")
        # Views made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            views = [[slot.view(dtype) for slot in buffer] for buffer in self._slots]
        self._typed_slots[dtype] = views
        return views

    def _cache_message_views(self, tensor: Tensor) -> tuple[int, _Views]:
        """Make views in the shape of `tensor`, so that a small sum costs no tensor bookkeeping."""
        if len(self._message_views) >= _MAX_CACHED_VIEWS:
            self._message_views.clear()
        num_elements, shape = tensor.numel(), tensor.shape
        slots = self._typed_slots.get(tensor.dtype) or self._cache_typed_slots(tensor.dtype)
        with torch.inference_mode(False):
            views = [[slot[:num_elements].view(shape) for slot in buffer] for buffer in slots]
        cached = _signature(_ALL_REDUCE, tensor.dtype, num_elements), views
        self._message_views[tensor.dtype, shape] = cached
        return cached


class _Chunk:
    """One chunk of a two-shot sum; `own` `[n]` is that part of this rank's tensor, `slots` is every rank's."""

    __slots__ = ("_own", "_ranges", "_rank", "_slots")

    def __init__(self, own: Tensor, slots: list[Tensor], rank: int) -> None:
        self._own = own
        self._slots = slots
        self._rank = rank
        size = -(-own.numel() // len(slots) // _ALIGN_ELEMENTS) * _ALIGN_ELEMENTS
        self._ranges = [
            slice(min(r * size, own.numel()), min((r + 1) * size, own.numel())) for r in range(len(slots))
        ]

    def stage(self) -> None:
        """Give the others what they sum; the range that this rank sums stays at home."""
        for rank, elements in enumerate(self._ranges):
            if rank != self._rank:
                self._slots[self._rank][elements].copy_(self._own[elements])

    def sum_own_range(self) -> None:
        """Sum this rank's range of all ranks into this rank's slot, where nobody else reads that range."""
        elements = self._ranges[self._rank]
        parts = [slot[elements] for slot in self._slots]
        out = parts[self._rank]
        parts[self._rank] = self._own[elements]
        _fold(parts, out)

    def copy_sums(self) -> None:
        """Take every range from the rank that has summed it."""
        for slot, elements in zip(self._slots, self._ranges, strict=True):
            self._own[elements].copy_(slot[elements])


def _fold(parts: list[Tensor], out: Tensor) -> None:
    """Write the sum of `parts` to `out`, in order; `out` is none of them."""
    if len(parts) > 2 and out.dtype in (torch.bfloat16, torch.float16):
        total = parts[0].float()
        for part in parts[1:]:
            total.add_(part)
        out.copy_(total)
        return
    # Two 16-bit floats are added in float32 and rounded once, as they should be.
    torch.add(parts[0], parts[1], out=out)
    for part in parts[2:]:
        out.add_(part)
