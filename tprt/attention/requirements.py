"""What each attention backend needs: device, compute capability, types, head and block sizes, a package.

Knows nothing of what the backends do.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_HALF = (torch.bfloat16, torch.float16)
_ALL = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True, slots=True)
class AttentionSetup:
    """What a backend is to work on."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    block_size: int

    def capability(self) -> tuple[int, int]:
        """Return the compute capability of a CUDA device."""
        return torch.cuda.get_device_capability(self.device)


@dataclass(frozen=True, slots=True)
class Requirements:
    """What must hold for a backend that is no plain torch.

    Attributes:
        package: what is imported, and how it is installed.
        capability: the least compute capability.
        same_major: whether a higher major number is too much.
        dtypes: of queries, keys and values.
        block_multiple: what `cache.block_size` must be a multiple of; 0 means a power of two.
        head_multiple: what the size of a head must be a multiple of.
    """

    package: str
    capability: tuple[int, int]
    same_major: bool = False
    dtypes: tuple[torch.dtype, ...] = _HALF
    block_multiple: int = 1
    head_multiple: int = 8

    def unmet(self, setup: AttentionSetup) -> str | None:
        """Return what does not hold, with what to change, or None."""
        if setup.device.type != "cuda":
            return f"it needs a CUDA device, found {setup.device.type}; set runtime.device to cuda"
        return self._unmet_by_device(setup.capability()) or self._unmet_by_shape(setup)

    def _unmet_by_device(self, found: tuple[int, int]) -> str | None:
        major, minor = self.capability
        if found >= self.capability and (found[0] == major or not self.same_major):
            return None
        wanted = f"{major}.x" if self.same_major else f"{major}.{minor} or higher"
        return f"it needs a GPU of compute capability {wanted}, found {found[0]}.{found[1]}"

    def _unmet_by_shape(self, setup: AttentionSetup) -> str | None:
        if setup.dtype not in self.dtypes:
            known = ", ".join(_name(dtype) for dtype in self.dtypes)
            return f"it computes in {known}, found {_name(setup.dtype)}; change model.dtype"
        if setup.head_dim > 256 or setup.head_dim % self.head_multiple:
            multiple = f", a multiple of {self.head_multiple}" if self.head_multiple > 1 else ""
            return f"it needs heads of 256 numbers at most{multiple}, found {setup.head_dim}"
        size = setup.block_size
        if self.block_multiple == 0 and size & (size - 1):
            return f"it needs blocks of a power of two of tokens, found {size}; change cache.block_size"
        if self.block_multiple and size % self.block_multiple:
            return (
                f"it needs blocks of a multiple of {self.block_multiple} tokens, found {size}; set"
                f" cache.block_size to {self.block_multiple}"
            )
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


REQUIREMENTS = {
    "flash_attn_3": Requirements(
        "flash_attn_interface (pip install tokenspeed-fa3)", capability=(9, 0), same_major=True
    ),
    "flash_attn": Requirements("flash_attn (pip install flash-attn)", capability=(8, 0), block_multiple=256),
    "triton": Requirements(
        "triton (comes with torch for CUDA)", (7, 5), dtypes=_ALL, block_multiple=0, head_multiple=1
    ),
}
"""By backend, best first: the order in which `auto` tries them."""
