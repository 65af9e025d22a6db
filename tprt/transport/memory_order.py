"""The order of memory accesses between processes that share memory, as far as Python can ask for it.

Words in shared memory are aligned and are loaded and stored through `memoryview.cast("Q")`, which CPython
compiles to one 8-byte move each; two bytecodes are never merged or swapped. What is left is the machine.

x86-64 keeps loads in order, keeps stores in order and moves no load above an older store's load (Intel SDM
vol. 3A, 8.2.2: total store order); the fast string stores and the non-temporal stores of a `memcpy` come
before any later store (8.2.4; glibc ends the latter with SFENCE). "Payload, then its number" and "payload
read, then slot given back" need no more than that, so `fence` does nothing there.

Elsewhere (ARM) nothing is kept in order, and CPython has no fence. But to take an uncontended `threading.Lock`
is an atomic read-modify-write with acquire order, and to give it back is a release. One pair would let an
earlier store sink in and a later load rise in, where they may swap. In two pairs on one lock, what comes before
the first release cannot sink below it, what comes after the second acquire cannot rise above it, and the second
acquire reads what the first release wrote, hence comes after it: a full fence.

What goes through an eventfd needs no fence on any machine: the kernel changes and reads its counter under a
spin lock, so what a process did before it wrote is seen by whoever has read that counter.
"""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable


def make_fence(machine: str) -> Callable[[], None]:
    """Return what orders the accesses before it with those after it, on a `platform.machine()`."""
    if machine in ("x86_64", "AMD64"):
        return lambda: None
    lock = threading.Lock()

    def two_pairs() -> None:
        with lock:
            pass
        with lock:
            pass

    return two_pairs


fence = make_fence(platform.machine())
