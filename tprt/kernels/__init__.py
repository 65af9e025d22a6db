"""Triton kernels for CUDA devices, each beside the plain torch code of the layer that launches it.

A layer asks `can_use` and imports the kernel's module then, since none of them can be imported where Triton is
missing. Every kernel computes in float32 and rounds where the torch code rounds. Knows nothing of layers and
models.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_LEAST_CAPABILITY = (8, 0)


def can_use(tensor: Tensor) -> bool:
    """Tell whether `tensor` is of a type and on a device that the kernels here are for."""
    return tensor.is_cuda and tensor.dtype in _DTYPES and _works_on(tensor.device)


@cache
def _works_on(device: torch.device) -> bool:
    has_triton = find_spec("triton") is not None
    return has_triton and torch.cuda.get_device_capability(device) >= _LEAST_CAPABILITY


def power_of_two(size: int) -> int:
    """Return the least power of two that is not below `size`, 1 at least."""
    return 1 << (size - 1).bit_length() if size > 1 else 1
