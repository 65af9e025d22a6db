"""Having kernels compiled while a rank does something else.

Knows nothing of what is compiled, nor of what is done meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from tprt import kernels
from tprt.log import get_logger

_LOG = get_logger(__name__)


@contextmanager
def compiling_kernels(like: Tensor, rehearse: Callable[[], None]) -> Iterator[None]:
    """Compile, side by side and while the body runs, what `rehearse` launches; end when all of it is there.

    Where no kernel is for a tensor as `like`, only the body runs.

    Raises:
        Exception: what a launch of a kernel that does not compile would have raised.
    """
    if not kernels.can_use(like):
        yield
        return
    from tprt.kernels.compile_ahead import CompileAhead

    started_s = time.monotonic()
    with CompileAhead(like.device, torch.get_num_threads()) as ahead:
        with ahead.instead_of_launching():
            rehearse()
        rehearsed_s = time.monotonic()
        yield
        done_s = time.monotonic()
    _LOG.info(
        "made %d kernels ready: %.2f s to rehearse, and %.2f s more than what was done meanwhile",
        *(len(ahead), rehearsed_s - started_s, time.monotonic() - done_s),
    )
