"""Compiling kernels before their first launch, side by side.

A kernel is compiled when it is launched for the first time, and what comes behind it waits. `CompileAhead` is
shown those launches before. It notes them instead of running them; threads compile what each needs, with the
launcher that Triton has a C compiler build, and load it onto the device. For most of that Triton lets go of the
interpreter's lock. What is on disk from an earlier start is only loaded.

Knows nothing of what is launched.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock
from types import TracebackType
from typing import Any

import torch
from triton import knobs
from triton.runtime.cache import triton_key


class CompileAhead:
    """Compiles until its `with` block ends, which waits for all of it.

    Args:
        device: on which the kernels will run.
        num_threads: kernels that are compiled at the same time.

    Raises:
        Exception: at the end of the block, what a launch of a kernel that does not compile would have raised.
    """

    def __init__(self, device: torch.device, num_threads: int) -> None:
        self._pool = ThreadPoolExecutor(
            num_threads, "compile", initializer=torch.cuda.set_device, initargs=(device,)
        )
        # Triton's own hash takes a while, and every thread that finds it missing would compute it.
        self._hashed = self._pool.submit(triton_key)
        self._kernels: list[Future[None]] = []
        # By the kernel's function: one compiles the launcher, the others find it on disk.
        self._locks: defaultdict[Any, Lock] = defaultdict(Lock)

    def __len__(self) -> int:
        """Return how many kernels there were to compile."""
        return len(self._kernels)

    @contextmanager
    def instead_of_launching(self) -> Iterator[None]:
        """Take note of kernels that are launched for the first time, and compile them when the block ends.

        They leave what they should have written as it is. A kernel that was launched before runs.
        """
        noted: dict[tuple[Any, str], str] = {}

        def take_note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
            noted[fn.jit_function, key] = compile["specialization_data"]
            return True

        before, knobs.runtime.jit_cache_hook = knobs.runtime.jit_cache_hook, take_note
        try:
            yield
        finally:
            knobs.runtime.jit_cache_hook = before
        for (function, _), specialization in noted.items():
            self._kernels.append(
                self._pool.submit(self._make_ready, function, specialization, self._locks[function])
            )

    def __enter__(self) -> CompileAhead:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for kernel in self._kernels:
                    kernel.result()
        finally:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _make_ready(self, function: Any, specialization: str, lock: Lock) -> None:
        self._hashed.result()
        kernel = function.preload(specialization)
        with lock:
            # Asking for what launches it makes that, and loads the kernel.
            assert kernel.run is not None
