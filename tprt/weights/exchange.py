"""How the ranks of one host read what all of them need once: slots in shared memory, passed around.

Chunks are numbered alike on all ranks. Chunk `i` is read by rank `i % world_size` into slot `i % num_slots`.
Every rank takes what it needs of every chunk, in order, and says so; a slot is used again when all have. Chunks
that are in the page cache are not copied: that they are is passed on instead, and needs no slot. Knows nothing
of tensors and files.

    control page   a line of 64 bytes per rank: how many chunks it has taken
    board          a word for each of the last 65,536 chunks: its number and where it is
    slots          `num_slots` buffers, each begins at a page
"""

from __future__ import annotations

import contextlib
import mmap
import time
from types import TracebackType

from tprt.distributed.shm_memory import LINE_WORDS, NUM_BUFFERS, ShmGroupMemory, group_bytes, slots_start
from tprt.distributed.shm_rendezvous import exchange_memory
from tprt.errors import TransportTimeoutError
from tprt.transport.memory_order import fence
from tprt.weights.file_reader import buffer_bytes
from tprt.weights.read_plan import CHUNK_BYTES

_NUM_SLOTS = 16
_SLOT_BYTES = buffer_bytes(CHUNK_BYTES)
_BOARD_WORDS = 65_536
_CONTROL_BYTES = mmap.PAGESIZE + 8 * _BOARD_WORDS
_CODE_BITS = 24
_IS_CACHED = (1 << _CODE_BITS) - 1
# Sixteen slots hold tens of milliseconds of reading: nobody runs dry in such a sleep, and wake-ups cost CPU.
_FIRST_SLEEP_S, _LONGEST_SLEEP_S = 1e-3, 4e-3


class LoadExchange:
    """One rank's view of the slots; all but `take` may be called by several threads at a time."""

    def __init__(self, memory: ShmGroupMemory, rank: int, timeout_s: float) -> None:
        """Map `memory`, which belongs to the exchange from now on."""
        self.rank = rank
        self.world_size = memory.world_size
        self.timeout_s = timeout_s
        self._memory = memory
        self._mapping = memory.map()
        start = slots_start(memory.world_size)
        view = memoryview(self._mapping)
        words = view[start : start + _CONTROL_BYTES].cast("Q")
        self._taken = words[: mmap.PAGESIZE // 8]
        self._published = words[mmap.PAGESIZE // 8 :]
        first = start + _CONTROL_BYTES
        slots = [first + index * _SLOT_BYTES for index in range(_NUM_SLOTS)]
        self._slots = [view[slot : slot + _SLOT_BYTES] for slot in slots]
        self._views = [*self._slots, self._taken, self._published, words, view]

    def slot(self, chunk: int) -> memoryview:
        """Return the buffer of chunk number `chunk`."""
        return self._slots[chunk % _NUM_SLOTS]

    def is_mine(self, chunk: int) -> bool:
        """Whether this rank reads that chunk."""
        return chunk % self.world_size == self.rank

    def is_free(self, chunk: int) -> bool:
        """Whether the slot of `chunk` can be written: what was in it was published, and every rank took it."""
        before = chunk - _NUM_SLOTS
        if before >= 0 and (self._all_have_taken() <= before or not self.is_published(before)):
            return False
        fence()
        return True

    def may_publish(self, chunk: int) -> bool:
        """Whether the word of `chunk` on the board is not needed by a rank that is far behind."""
        return chunk < self._all_have_taken() + _BOARD_WORDS

    def _all_have_taken(self) -> int:
        return min(self._taken[rank * LINE_WORDS] for rank in range(self.world_size))

    def publish(self, chunk: int, start: int | None) -> None:
        """Say that `chunk` is in its slot from byte `start` on, or, for None, that it is in the page cache."""
        fence()
        code = _IS_CACHED if start is None else start
        self._published[chunk % _BOARD_WORDS] = (chunk + 1) << _CODE_BITS | code

    def is_published(self, chunk: int) -> bool:
        """Whether `chunk` can be taken."""
        published = self._published[chunk % _BOARD_WORDS] >> _CODE_BITS == chunk + 1
        if published:
            fence()
        return published

    def start_of(self, chunk: int) -> int | None:
        """Return what `publish` was told of a chunk that is published."""
        code = self._published[chunk % _BOARD_WORDS] & _IS_CACHED
        return None if code == _IS_CACHED else code

    def take(self, chunk: int) -> None:
        """Say that this rank needs `chunk` no more; chunks are taken in order."""
        fence()
        self._taken[self.rank * LINE_WORDS] = chunk + 1

    def describe_slowest(self, chunk: int) -> str:
        """Say who keeps the slot of `chunk` from being free."""
        taken, rank = min((self._taken[rank * LINE_WORDS], rank) for rank in range(self.world_size))
        return f"rank {rank} has taken {taken} chunks, and chunk {chunk} needs its slot"

    def close(self) -> None:
        """Let go of the memory, all of it, since whoever holds this object may live on; idempotent."""
        self._memory.close()
        # After an error a traceback may still hold what was being read.
        with contextlib.suppress(BufferError):
            for view in self._views:
                view.release()
            self._mapping.close()

    def __enter__(self) -> LoadExchange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def join_load_exchange(path: str, rank: int, world_size: int, timeout_s: float) -> LoadExchange | None:
    """Meet the other ranks of this host at the unix socket `path`, in a directory that is private to them.

    Returns:
        None where there are no others.

    Raises:
        TransportTimeoutError, PeerLostError, TransportError: as `exchange_memory` does.
    """
    if world_size == 1:
        return None
    memory = exchange_memory(path, rank, world_size, timeout_s, _memory_slot_bytes(world_size))
    return LoadExchange(memory, rank, timeout_s)


def make_local_exchanges(world_size: int, timeout_s: float) -> list[LoadExchange]:
    """Return the exchanges of ranks that are threads of this process."""
    memory = ShmGroupMemory.create(world_size, _memory_slot_bytes(world_size))
    return [LoadExchange(memory, rank, timeout_s) for rank in range(world_size)]


def exchange_bytes(world_size: int) -> int:
    """Return the bytes of shared memory that the ranks of a host have while they load."""
    return group_bytes(world_size, _memory_slot_bytes(world_size)) if world_size > 1 else 0


def _memory_slot_bytes(world_size: int) -> int:
    """Return the slot size for which a group's memory has room for the lines and slots of an exchange."""
    return -(-(_CONTROL_BYTES + _NUM_SLOTS * _SLOT_BYTES) // (NUM_BUFFERS * world_size))


class Patience:
    """Waits that begin short and end at a deadline."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._sleep_s = _FIRST_SLEEP_S

    def wait(self, what: str) -> None:
        """Sleep a little.

        Raises:
            TransportTimeoutError: the deadline is over; says that `what` did not happen.
        """
        if time.monotonic() > self._deadline_s:
            raise TransportTimeoutError(f"loading stands still for {self._timeout_s:g} s: {what}")
        time.sleep(self._sleep_s)
        self._sleep_s = min(2 * self._sleep_s, _LONGEST_SLEEP_S)
