"""The gated activation of the MLP (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from tprt import kernels


class SiluAndMul(nn.Module):
    """`silu(gate) * up` of a merged projection `[gate | up]`."""

    def forward(self, gate_up: Tensor) -> Tensor:
        """`gate_up` `[T, 2 i]` to `[T, i]`."""
        if kernels.can_use(gate_up):
            from tprt.kernels.activation import silu_and_mul

            return silu_and_mul(gate_up.contiguous())
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate).mul_(up)
