"""Attention by FlashAttention 3, for GPUs of compute capability 9: package `flash_attn_interface`.

One varlen call over the paged cache serves chunks, and chunks with decodes. Steps of decodes alone go to our
own split-KV kernel, which is ahead of the package there at every batch and length
(`scripts/bench_attention.py`). Knows nothing of how a call is split and scheduled.
"""

from __future__ import annotations

from typing import ClassVar

from flash_attn_interface import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from tprt.attention.backend import AttentionBackend
from tprt.attention.triton import TritonBackend, store_kv
from tprt.context import Context
from tprt.kernels.preparation import Preparation


class FlashAttention3Backend(AttentionBackend):
    """Paged attention at any block size, in bfloat16 and float16."""

    name: ClassVar[str] = "flash_attn_3"
    capturable: ClassVar[bool] = True

    def __init__(self, scale: float) -> None:
        self._scale = scale
        self._decoder = TritonBackend(scale)
        self._kv_lens: tuple[Context, Tensor] | None = None

    def write_kv(self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor) -> None:
        store_kv(key, value, kv_cache, slot_mapping)

    def prefill(self, qkv: tuple[Tensor, Tensor, Tensor], kv_cache: Tensor, context: Context) -> Tensor:
        query, key, value = qkv
        if context.block_tables is None:
            output: Tensor = flash_attn_varlen_func(
                *(query, key, value, context.cu_seqlens_q, context.cu_seqlens_k),
                *(context.max_seqlen_q, context.max_seqlen_k),
                softmax_scale=self._scale,
                causal=True,
            )
            return output
        key_cache, value_cache = kv_cache.unbind()
        paged: Tensor = flash_attn_with_kvcache(
            *(query, key_cache, value_cache),
            cache_seqlens=self._kv_lens_of(context),
            page_table=context.block_tables,
            cu_seqlens_q=context.cu_seqlens_q,
            max_seqlen_q=context.max_seqlen_q,
            softmax_scale=self._scale,
            causal=True,
        )
        return paged

    def decode(self, query: Tensor, kv_cache: Tensor, context: Context) -> Tensor:
        return self._decoder.decode(query, kv_cache, context)

    def prepares(self, num_seqs: int, kv_cache: Tensor) -> bool:
        return self._decoder.prepares(num_seqs, kv_cache)

    def prepare_and_decode(self, heads: Tensor, how: Preparation, kv_cache: Tensor, context: Context) -> Tensor:
        return self._decoder.prepare_and_decode(heads, how, kv_cache, context)

    def _kv_lens_of(self, context: Context) -> Tensor:
        """Return the KV length of every sequence, `[S]` int32, made by the first layer of a step."""
        if self._kv_lens is None or self._kv_lens[0] is not context:
            assert context.cu_seqlens_k is not None
            self._kv_lens = context, context.cu_seqlens_k.diff()
        return self._kv_lens[1]
