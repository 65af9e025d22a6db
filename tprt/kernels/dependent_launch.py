# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
"""Kernels that begin while the one before them still runs (programmatic dependent launch).

A step of a model is hundreds of kernels of a few microseconds, and starting and ending is a good part of those.
On compute capability 9 and beyond a kernel may be launched as a dependent: its programs start as soon as all
programs of the one before have, and stop at `await_predecessor` until that one has ended and what it wrote can
be seen (CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization").

Before that line a kernel may read what no dependent kernel writes in a step: weights, tables, and what the step
brought along. It may write nothing. Every kernel that is launched as a dependent has the line, on all its ways:
so whoever waits for a kernel waits for all that came before it. Kernels of torch start and end as ever.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl

_LEAST_CAPABILITY = (9, 0)
LINE_BYTES = tl.constexpr(128)
"""What the L2 cache keeps together."""


@triton.jit
def await_predecessor(dependent: tl.constexpr):
    """Wait for the end of the kernel before, and let the next one begin.

    The other way round a whole queue of kernels would begin, and keep room from the one that has work to do.
    """
    if dependent:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers):
    """Bring the lines at `pointers` into the L2 cache; nothing is read, so this may be done at any time."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@cache
def dependent_options(device: torch.device) -> dict[str, bool]:
    """Return the kernel's constant `dependent` for a launch on `device`, and the option of the launch."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < _LEAST_CAPABILITY:
        return {"dependent": False}
    return {"dependent": True, "launch_pdl": True}
