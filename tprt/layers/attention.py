"""The attention layer: stores this step's keys and values, then lets the backend attend.

Which kernel runs is decided by the `Context`. Knows nothing of projections and rotary embedding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tprt.attention import AttentionBackend
from tprt.context import get_context
from tprt.kernels.preparation import Preparation


class Attention(nn.Module):
    """Attention of one layer over this rank's heads; `kv_cache` is given by the worker."""

    kv_cache: Tensor
    """`[2, N, block_size, kv, D]`; empty until the worker has allocated the KV blocks."""

    def __init__(self, num_kv_heads: int, head_dim: int, backend: AttentionBackend) -> None:
        super().__init__()
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.kv_cache = torch.empty(0)
        self._backend = backend

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """`query` `[T, h, D]`, `key` and `value` `[T, kv, D]`, to `[T, h, D]`."""
        slots = get_context().slot_mapping
        if slots is not None:
            self._backend.write_kv(key, value, self.kv_cache, slots)
        return self.attend(query, key, value)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend when `key` and `value` have been stored already, as `forward` would have done it."""
        context = get_context()
        if context.is_prefill:
            return self._backend.prefill((query, key, value), self.kv_cache, context)
        return self._backend.decode(query, self.kv_cache, context)

    def prepares(self, num_tokens: int) -> bool:
        """Tell whether this step, of `num_tokens`, is one for `prepare_and_decode`."""
        return not get_context().is_prefill and self._backend.prepares(num_tokens, self.kv_cache)

    def prepare_and_decode(self, heads: Tensor, how: Preparation) -> Tensor:
        """Turn projected heads `[S, h + 2 kv, D]` of decodes to `[S, h, D]`, storing keys and values."""
        return self._backend.prepare_and_decode(heads, how, self.kv_cache, get_context())
