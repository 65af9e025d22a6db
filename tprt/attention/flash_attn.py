"""Attention by FlashAttention 2, for GPUs of compute capability 8 and above: package `flash_attn`.

Its paged kernels take blocks of a multiple of 256 tokens; the registry sees to that. Knows nothing of how the
call is split and scheduled: the package decides that.
"""

from __future__ import annotations

from typing import ClassVar

from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from tprt.attention.backend import AttentionBackend
from tprt.attention.triton import store_kv
from tprt.context import Context


class FlashAttention2Backend(AttentionBackend):
    """Paged attention over large blocks, in bfloat16 and float16."""

    name: ClassVar[str] = "flash_attn"
    capturable: ClassVar[bool] = True

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def write_kv(self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        store_kv(key, value, kv_cache, slot_mapping)

    def prefill(self, qkv: tuple[Tensor, Tensor, Tensor], kv_cache: Tensor, context: Context) -> Tensor:
        query, key, value = qkv
        if context.block_tables is not None:
            key, value = kv_cache.unbind()
        output: Tensor = flash_attn_varlen_func(
            *(query, key, value, context.cu_seqlens_q, context.cu_seqlens_k),
            *(context.max_seqlen_q, context.max_seqlen_k),
            softmax_scale=self._scale,
            causal=True,
            block_table=context.block_tables,
        )
        return output

    def decode(self, query: Tensor, kv_cache: Tensor, context: Context) -> Tensor:
        key_cache, value_cache = kv_cache.unbind()
        output: Tensor = flash_attn_with_kvcache(
            *(query.unsqueeze(1), key_cache, value_cache),
            cache_seqlens=context.context_lens,
            block_table=context.block_tables,
            softmax_scale=self._scale,
            causal=True,
        )
        return output.squeeze(1)
