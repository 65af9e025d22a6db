"""What is tried of the CUDA devices, step by step, in one process: to open them takes longer than all the rest.

It says of each step that it has begun and what came of it, so that whoever listens can name the one that hangs.
Knows nothing of verdicts, and does not import torch.
"""

from __future__ import annotations

import ctypes
import itertools
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from launch.cuda_devices import CudaDevice, look_at_device
from launch.cuda_driver import JIT_COMPILER_NOT_FOUND, CudaDriver, CudaError, are_gpus_linked
from launch.doctor.nccl import Nccl, NcclMissingError

_NUM_COPIED = 2**19
_NUM_SUMMED = 2**16
_NUM_THREADS = 4096
_ADDED = 7
# A group of fewer devices is not begun with less.
_LEAST_S = 1.5
# For any device that CUDA still knows: the driver compiles it. Thread i writes i * factor + 7.
_KERNEL = b"""
.version 6.0
.target sm_50
.address_size 64
.visible .entry affine(.param .u64 out, .param .u64 factor) {
    .reg .b32 %r<6>;
    .reg .b64 %d<4>;
    ld.param.u64 %d0, [out];
    ld.param.u32 %r0, [factor];
    cvta.to.global.u64 %d1, %d0;
    mov.u32 %r1, %ctaid.x;
    mov.u32 %r2, %ntid.x;
    mov.u32 %r3, %tid.x;
    mad.lo.u32 %r4, %r1, %r2, %r3;
    mad.lo.u32 %r5, %r4, %r0, 7;
    mul.wide.u32 %d2, %r4, 4;
    add.u64 %d3, %d1, %d2;
    st.global.u32 [%d3], %r5;
    ret;
}
"""


@dataclass(frozen=True, slots=True)
class Step:
    """Something that is done with a device, from one to another, or by a number of them.

    Attributes:
        kind: driver, open, compute, copy, nccl or sum.
        numbers: of devices; of a sum, how many take part.
    """

    kind: str
    numbers: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """What a step says in the place of its result; `is_missing`: a library that it needs is not there."""

    text: str
    is_missing: bool = False


@dataclass(frozen=True, slots=True)
class Seen:
    """How many devices this process sees, and whether those of the ranks reach one another with atomics."""

    num_devices: int
    are_linked: bool


@dataclass(frozen=True, slots=True)
class Opened:
    """A device that has been opened, and what torch's kernels must be built for."""

    device: CudaDevice
    capability: tuple[int, int]


@dataclass(slots=True)
class GpuWork:
    """Everything that is tried of the first `num_processes` devices, the first `num_ranks` of them together.

    `uses_nccl` tells whether these sum where each rank has a device: all, and then fewer, until `end_s` on the
    monotonic clock.
    """

    num_processes: int
    num_ranks: int
    uses_nccl: bool
    end_s: float
    listener: Connection
    _driver: CudaDriver = field(init=False)
    _contexts: dict[int, ctypes.c_void_p] = field(init=False, default_factory=dict)
    _speaking: threading.Lock = field(init=False, default_factory=threading.Lock)

    def play(self) -> None:
        """Take all steps, and wait to be ended: contexts take their time to go, and nobody need wait for it."""
        if self._take(Step("driver"), self._begin):
            used = range(min(self.num_processes, self._driver.num_devices))
            with ThreadPoolExecutor(max(1, len(used))) as threads:
                are_well = list(threads.map(self._try_alone, used))
            if all(are_well):
                self._try_together(used[: self.num_ranks])
        signal.pause()

    def _take(self, step: Step, body: Callable[[], Any]) -> bool:
        """Take a step: say so, and what comes of it; return whether it did not fail."""
        self._say(step, None)
        try:
            result = body()
        except Exception as error:  # noqa: BLE001 - the outermost frame of a thread
            has_no_compiler = isinstance(error, CudaError) and error.code == JIT_COMPILER_NOT_FOUND
            is_missing = has_no_compiler or isinstance(error, NcclMissingError)
            result = Failure(str(error) or type(error).__name__, is_missing)
        self._say(step, result)
        return not isinstance(result, Failure)

    def _say(self, step: Step, result: Any) -> None:
        with self._speaking:
            self.listener.send((step, result))

    def _begin(self) -> Seen:
        self._driver = CudaDriver()
        count = self._driver.num_devices
        return Seen(count, are_gpus_linked(min(self.num_ranks, count)))

    def _try_alone(self, index: int) -> bool:
        if not self._take(Step("open", (index,)), lambda: self._open(index)):
            return False
        # Whoever computes wrongly can still copy.
        self._take(Step("compute", (index,)), lambda: self._compute(index))
        return True

    def _open(self, index: int) -> Opened:
        self._contexts[index] = self._driver.open(index)
        return Opened(look_at_device(self._driver, index), self._driver.capability(index))

    def _compute(self, index: int) -> bool:
        factor = ctypes.c_uint64(index + 3)
        out = self._driver.put(bytes(4 * _NUM_THREADS))
        self._driver.run(_KERNEL, b"affine", _NUM_THREADS, out, factor)
        return self._driver.take(out, 4 * _NUM_THREADS) == _affine(_NUM_THREADS, factor.value)

    def _try_together(self, used: Sequence[int]) -> None:
        pairs = list(itertools.permutations(used, 2))
        if pairs:
            _InTurn(self._copy_pair).run(pairs)
        if len(used) < max(2, self.num_ranks) or not self.uses_nccl:
            return
        libraries: list[Nccl] = []
        if self._take(Step("nccl"), lambda: self._load(libraries)):
            for size in (len(used), *range(2, len(used))):
                if size == len(used) or self.end_s - time.monotonic() > _LEAST_S:
                    self._take(Step("sum", (size,)), partial(self._sum, libraries[0], size))

    def _copy_pair(self, source: int, target: int) -> None:
        self._take(Step("copy", (source, target)), lambda: self._copy(source, target))

    def _copy(self, source: int, target: int) -> tuple[bool, bool]:
        """Write from one device into another; return whether that is direct, and whether it arrived."""
        driver, (from_, to) = self._driver, (self._contexts[source], self._contexts[target])
        is_direct = driver.reaches(source, target)
        written, num_bytes = _affine(_NUM_COPIED, 2 * source + 1), 4 * _NUM_COPIED
        driver.enter(to)
        received = driver.put(bytes(num_bytes))
        driver.enter(from_)
        if is_direct:
            driver.reach(to)
        sent = driver.put(written)
        driver.copy((to, received), (from_, sent), num_bytes)
        driver.free(sent)
        driver.enter(to)
        return is_direct, driver.take(received, num_bytes) == written

    def _load(self, libraries: list[Nccl]) -> str:
        libraries.append(Nccl())
        return libraries[0].version()

    def _sum(self, nccl: Nccl, size: int) -> bool:
        """Sum over the first `size` devices; return whether each has the right sum."""
        communicators, addresses = nccl.meet(range(size)), []
        for index in range(size):
            self._driver.enter(self._contexts[index])
            addresses.append(self._driver.put(_affine(_NUM_SUMMED, index + 1)))
        nccl.sum(communicators, addresses, _NUM_SUMMED)
        expected = _affine(_NUM_SUMMED, size * (size + 1) // 2, _ADDED * size)
        sums = []
        for index, address in enumerate(addresses):
            self._driver.enter(self._contexts[index])
            sums.append(self._driver.take(address, 4 * _NUM_SUMMED))
        nccl.part(communicators)
        return all(found == expected for found in sums)


class _InTurn:
    """Does something for pairs of devices at the same time, but for those that share one."""

    def __init__(self, body: Callable[[int, int], None]) -> None:
        self._body = body
        self._busy: set[int] = set()
        self._changed = threading.Condition()

    def run(self, pairs: Sequence[tuple[int, int]]) -> None:
        with ThreadPoolExecutor(len(pairs)) as threads:
            list(threads.map(self._wait_and_do, pairs))

    def _wait_and_do(self, pair: tuple[int, int]) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._busy.isdisjoint(pair))
            self._busy.update(pair)
        try:
            self._body(*pair)
        finally:
            with self._changed:
                self._busy.difference_update(pair)
                self._changed.notify_all()


@cache
def _affine(num_elements: int, factor: int, added: int = _ADDED) -> bytes:
    """Return the 32-bit integers `i * factor + added`."""
    return (np.arange(num_elements, dtype=np.uint32) * np.uint32(factor) + np.uint32(added)).tobytes()
