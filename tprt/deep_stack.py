"""A call on a deep stack: for a parser or compiler that recurses as deep as what somebody else has sent.

Python's own recursion has a limit and raises; native code that exceeds the usual 8 MiB ends the process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

Result = TypeVar("Result")

# Only what is used of it takes memory.
_STACK_BYTES = 256 << 20
_size_of_next = threading.Lock()


def call_on_deep_stack(work: Callable[[], Result]) -> Result:
    """Return what `work` returns, or raise what it raises, after it has run in a thread with a deep stack."""
    with ThreadPoolExecutor(1, "deep stack") as executor:
        with _size_of_next:
            usual = threading.stack_size(_STACK_BYTES)
            try:
                result = executor.submit(work)
            finally:
                threading.stack_size(usual)
        return result.result()
